// The line on Train LoRA and Save LoRA that says where the LoRA file lies, with a button that copies its path.

import { element, write } from "./dom.mjs";

export const WRITERS = ["G2RPO_TrainLoRA", "G2RPO_SaveLoRA", "G2RPO_TrainingResult"];
const HEIGHT = 28;
const WIDTH = 340;
const BACK_AFTER = 2500;
const COPY = "Copy path";

// Joins the folder and the name of a file in the manner of the server's system, which the folder shows.
export function joined(folder, name) {
  const line = folder.includes("\\") && !folder.startsWith("/") ? "\\" : "/";
  return [folder.replace(/[\\/]+$/, ""), ...name.split(/[\\/]+/)].join(line);
}

// The folder of LoRAs in the answer of core's own /experiment/models; without it the path begins at ComfyUI's folder.
export function folderIn(answer) {
  const found = Array.isArray(answer) ? answer.find((each) => each?.name === "loras")?.folders?.[0] : null;
  return typeof found === "string" && found ? found : "models/loras";
}

// Copies the text of an input: by the clipboard where the page may, else by selecting it. Returns whether it was copied.
export async function copy(input, text, { clipboard = globalThis.navigator?.clipboard, page = globalThis.document } = {}) {
  input.value = text;
  input.focus();
  input.select();
  try {
    // Browsers offer no clipboard to a page that came over plain HTTP from another machine.
    await clipboard.writeText(text);
    return true;
  } catch {
    input.select();
    return Boolean(page.execCommand?.("copy"));
  }
}

export class CopyPath {
  // `nodeOf(id)` finds a node, `get(path)` asks the server.
  constructor({ app, nodeOf, get, widgets }) {
    Object.assign(this, { app, nodeOf, get, widgets, lines: new Map(), folder: null });
  }

  add(node) {
    const input = element("input", { readonly: "", spellcheck: "false", "aria-label": "LoRA file", placeholder: "No LoRA file yet" });
    const button = element("button", { type: "button", disabled: "" }, COPY);
    const line = { root: element("div", { class: "g2rpo-file" }, input, button), input, button, name: "" };
    button.addEventListener("click", () => this.copy(line));
    this.lines.set(node, line);
    this.widgets.attach(node, "g2rpo_file", line.root, { height: HEIGHT, width: WIDTH, fixed: true, removed: () => this.lines.delete(node) });
  }

  executed(detail) {
    const name = detail?.output?.g2rpo_file?.[0];
    const node = this.nodeOf(detail?.display_node ?? detail?.node);
    if (typeof name !== "string" || !this.lines.has(node)) return;
    this.show(node, name);
    if (node.properties?.g2rpo_file === name) return;
    (node.properties ??= {}).g2rpo_file = name;
    const tracker = this.app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
  }

  // A workflow that was opened names the file of its last run; it is shown where it is there.
  async restore(node) {
    const name = node.properties?.g2rpo_file;
    if (typeof name !== "string" || !this.lines.has(node)) return;
    const { status } = await this.get(`/view_metadata/loras?filename=${encodeURIComponent(name)}`);
    if (status === 200 && !this.lines.get(node)?.name) this.show(node, name);
  }

  show(node, name) {
    const line = this.lines.get(node);
    if (!line) return;
    Object.assign(line, { name });
    line.button.disabled = false;
    this.rest(line);
    this.learn().then((folder) => line.input.setAttribute("title", joined(folder, name)));
  }

  // Asked for once, and before anybody presses the button: a browser lets a page copy only right after a click.
  learn() {
    this.folder ??= this.get("/experiment/models").then(({ data }) => (this.place = folderIn(data)));
    return this.folder;
  }

  async copy(line) {
    clearTimeout(line.timer);
    const done = await copy(line.input, joined(this.place ?? folderIn(null), line.name));
    write(line.button, done ? "Copied" : "Press Ctrl+C");
    if (done) line.timer = setTimeout(() => this.rest(line), BACK_AFTER);
  }

  rest(line) {
    line.input.value = line.name;
    write(line.button, COPY);
  }
}
