// The strip of evaluation pictures: for each prompt and seed the untrained model's picture beside the newest one. A click enlarges them.

import { number } from "./curve.mjs";
import { element } from "./dom.mjs";
import { enlarge } from "./enlarge.mjs";

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
