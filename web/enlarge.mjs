// One prompt's pictures, large, over the page: the untrained model's beside the newest one, with the prompt and the scores.

import { element, write } from "./dom.mjs";

// Opens at the picture pair `at` of `count`. `pair(i)` answers {prompt, pictures: [{src, alt, words}]}; `back(i)` is called with the last one seen when it closes.
export function enlarge({ count, at, pair, back }) {
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
