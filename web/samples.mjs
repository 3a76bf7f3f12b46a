// The strip of evaluation pictures: for each prompt and seed the untrained model's picture beside the newest one. A click enlarges them over the page.

import { number } from "./curve.mjs";
import { element, write } from "./dom.mjs";

const MAX_PAIRS = 24;

// `address(folder, file)` answers where a picture is; `strip()` where the strip is now, which is made anew when pictures come.
export function samplesStrip(samples, address, strip) {
  if (!samples.length) return [];
  const [first, last] = [samples[0], samples.at(-1)];
  const shown = first === last ? [first] : [first, last];
  const score = Object.keys(first.files[0]?.scores ?? {})[0];
  const heading = `Samples: ${shown.map((sample) => `step ${sample.step}`).join(" → ")}${score ? `, ${score}` : ""}`;
  const pairs = first.files.slice(0, MAX_PAIRS).map((file) =>
    shown.map((sample) => [sample, sample.files.find((other) => other.file === file.file)]).filter(([, picture]) => picture),
  );
  const pair = (i) => ({ prompt: pairs[i][0][1].prompt, pictures: pairs[i].map(([sample, picture]) => large(sample, picture, address)) });
  const back = (i) => strip()?.querySelectorAll("button")[i]?.focus();
  const open = (at) => enlarge({ count: pairs.length, at, pair, back });
  const small = pairs.map((pictures, i) => thumbnail(pictures, score, address, () => open(i)));
  return [element("div", { class: "g2rpo-heading" }, heading), element("div", { class: "g2rpo-strip", role: "list", "aria-label": heading }, ...small)];
}

function thumbnail(pictures, score, address, open) {
  const images = pictures.map(([sample, picture]) => {
    const { src, alt } = large(sample, picture, address);
    return element("img", { src, alt, loading: "lazy", decoding: "async", draggable: "false" });
  });
  const button = element("button", { type: "button", class: "g2rpo-pair", title: `${pictures[0][1].prompt}\nClick to enlarge` }, ...images);
  button.addEventListener("click", open);
  const caption = score ? pictures.map(([, picture]) => number(picture.scores[score])).join(" → ") : "";
  return element("figure", { role: "listitem" }, button, element("figcaption", {}, caption));
}

function large(sample, picture, address) {
  const words = [`Step ${sample.step}`, ...Object.entries(picture.scores).map(([name, value]) => `${name} ${number(value)}`)];
  return { src: address(sample.folder, picture.file), alt: [words[0], picture.prompt, ...words.slice(1)].join(", "), words: words.join(" · ") };
}

// Shows one prompt's pictures large. Opens at the pair `at` of `count`. `pair(i)` answers {prompt, pictures: [{src, alt, words}]}; `back(i)` is called with the last one seen when it closes.
function enlarge({ count, at, pair, back }) {
  let here = at;
  const prompt = element("p", { class: "g2rpo-prompt" });
  const pictures = element("div", { class: "g2rpo-large" });
  const place = element("span", { class: "g2rpo-where" });
  const previous = step("‹", "Previous prompt (left arrow)", -1);
  const next = step("›", "Next prompt (right arrow)", 1);
  const close = element("button", { type: "button", title: "Close (Escape)" }, "Close");
  const foot = element("div", { class: "g2rpo-foot" }, previous, place, next, close);
  const dialog = element("dialog", { class: "g2rpo g2rpo-enlarged", "aria-label": "Sample" }, pictures, prompt, foot);

  function step(label, title, by) {
    const button = element("button", { type: "button", title, "aria-label": title }, label);
    button.addEventListener("click", (event) => {
      event.stopPropagation();
      go(by);
    });
    return button;
  }

  function go(by) {
    here = Math.max(0, Math.min(count - 1, here + by));
    const shown = pair(here);
    pictures.replaceChildren(
      ...shown.pictures.map(({ src, alt, words }) =>
        element("figure", {}, element("img", { src, alt, draggable: "false" }), element("figcaption", {}, words)),
      ),
    );
    write(prompt, shown.prompt);
    write(place, `${here + 1} of ${count}`);
    previous.disabled = here === 0;
    next.disabled = here === count - 1;
  }

  // A click closes it, except where somebody selects the prompt's words.
  dialog.addEventListener("click", (event) => {
    if (event.target !== prompt) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    // The canvas and the page's own shortcuts are behind the dialog.
    event.stopPropagation();
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === "Escape") dialog.close();
    else return;
    event.preventDefault();
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    back(here);
  });
  go(0);
  document.body.append(dialog);
  dialog.showModal();
  close.focus();
  return dialog;
}
