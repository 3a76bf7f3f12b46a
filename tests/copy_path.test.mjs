// The line that copies a LoRA file's path: `node --test tests/copy_path.test.mjs`.

import assert from "node:assert/strict";
import test from "node:test";
import { CopyPath, copy, folderIn, joined } from "../web/copy_path.mjs";

for (const [folder, name, path] of [
  ["/home/me/ComfyUI/models/loras", "g2rpo/a.safetensors", "/home/me/ComfyUI/models/loras/g2rpo/a.safetensors"],
  ["/data/", "g2rpo/a.safetensors", "/data/g2rpo/a.safetensors"],
  ["C:\\ComfyUI\\models\\loras", "g2rpo\\a.safetensors", "C:\\ComfyUI\\models\\loras\\g2rpo\\a.safetensors"],
  ["D:\\loras\\", "g2rpo/a.safetensors", "D:\\loras\\g2rpo\\a.safetensors"],
  ["\\\\host\\share", "g2rpo\\a.safetensors", "\\\\host\\share\\g2rpo\\a.safetensors"],
]) {
  test(`a path is that of the server's system: ${path}`, () => assert.equal(joined(folder, name), path));
}

test("the folder is what core says, or where LoRAs usually are", () => {
  assert.equal(folderIn([{ name: "vae", folders: ["/v"] }, { name: "loras", folders: ["/one", "/two"] }]), "/one");
  for (const odd of [null, {}, [], [null], [{ name: "loras" }], [{ name: "loras", folders: [] }], [{ name: "loras", folders: [7] }]]) {
    assert.equal(folderIn(odd), "models/loras");
  }
});

const field = () => ({ value: "", selected: 0, focus() {}, select() { this.selected += 1; } });

test("the clipboard is used where there is one", async () => {
  const [input, written] = [field(), []];
  assert.equal(await copy(input, "/a", { clipboard: { writeText: async (text) => written.push(text) }, page: {} }), true);
  assert.deepEqual([written, input.value], [["/a"], "/a"]);
});

for (const [why, clipboard] of [["there is none", undefined], ["it is refused", { writeText: async () => { throw new Error("no"); } }]]) {
  test(`the text is selected and copied as of old where ${why}`, async () => {
    for (const answer of [true, false]) {
      const [input, asked] = [field(), []];
      const page = { execCommand: (what) => (asked.push(what), answer) };
      assert.equal(await copy(input, "/a", { clipboard, page }), answer);
      assert.deepEqual([asked, input.value, input.selected > 0], [["copy"], "/a", true]);
    }
    assert.equal(await copy(field(), "/a", { clipboard, page: {} }), false);
  });
}

test("what others send changes nothing", () => {
  const lines = new CopyPath({ app: {}, nodeOf: () => ({}), get: async () => ({}), scroll() {} });
  for (const detail of [undefined, {}, { output: null }, { output: { g2rpo_file: [7] } }, { output: { g2rpo_file: ["x"] } }]) lines.executed(detail);
  assert.equal(lines.folder, null);
});
