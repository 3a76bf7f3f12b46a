// What our blocks say while they run and when they are done, as plain text in a place of a fixed height that scrolls.

import { element, write } from "./dom.mjs";
import { TEXT_LINES } from "./roles.mjs";

const LINE = 16;
const PADDING = 12;
const HINT = "The result appears here after a run.";

export const heightOf = (lines) => lines * LINE + PADDING;

export class Texts {
  // `place(node)` names a node within its workflow.
  constructor({ nodeOf, widgets, place }) {
    Object.assign(this, { nodeOf, widgets, place, shown: new Map(), said: new Map() });
  }

  add(node) {
    const lines = TEXT_LINES[node.comfyClass];
    if (!lines) return;
    const text = element("div", { class: "g2rpo-text", tabindex: "0", role: "region", "aria-label": "Result", "data-capture-wheel": "true" });
    const root = element("div", { class: "g2rpo g2rpo-said" }, text);
    this.shown.set(node, text);
    this.write(node, "");
    // Keys that move and copy a text are not the canvas's.
    text.addEventListener("keydown", (event) => event.stopPropagation());
    this.widgets.attach(node, "g2rpo_text", root, { height: heightOf(lines), removed: () => this.shown.delete(node) });
  }

  // Takes {node, text} of a running block.
  take({ node: id, text } = {}) {
    const node = this.nodeOf(id);
    if (typeof text === "string") this.say(node, text);
  }

  say(node, text) {
    if (!this.shown.has(node)) return;
    this.said.set(this.place(node), text);
    this.write(node, text);
  }

  executed(detail) {
    const text = detail?.output?.text;
    if (text) this.take({ node: detail.display_node ?? detail.node, text: Array.isArray(text) ? text.join("\n\n") : text });
  }

  // Undo, and opening the workflow once more, make all nodes anew: what was said is said again.
  restore(node) {
    if (this.shown.has(node)) this.write(node, this.said.get(this.place(node)) ?? "");
  }

  write(node, text) {
    const place = this.shown.get(node);
    write(place, text || HINT);
    place.toggleAttribute("data-empty", !text);
  }
}
