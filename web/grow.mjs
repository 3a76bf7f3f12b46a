// Mix Rewards shows the rewards that are linked and one free one. No ComfyUI is imported here.

import { after } from "./widgets.mjs";

export const MIXER = "G2RPO_MixRewards";
const LEAST = 2;
const MOST = 6;

// How inputs that were taken away looked: their names in the user's language.
const looks = new WeakMap();

// How many rewards are shown, where `linked` are the numbers of those that are: all up to the last linked one, and one more.
export function shown(linked) {
  return Math.min(MOST, Math.max(LEAST, ...linked.map((number) => number + 1)));
}

const slotOf = (node, name) => node.inputs.findIndex((input) => input.name === name);
const isLinked = (node, name) => node.inputs[slotOf(node, name)]?.link != null;

// Shows and hides what belongs to a reward. The values of hidden weights stay in their places, and so in the prompt. Of its `kind`s a "fresh"
// node gets the height that it needs, a "saved" one keeps its own, and a "linked" one changes its own by what came or went.
export function arrange(node, kind) {
  const numbers = Array.from({ length: MOST }, (_, i) => i + 1);
  const most = shown(numbers.filter((number) => isLinked(node, `reward_${number}`) || isLinked(node, `weight_${number}`)));
  const least = node.computeSize()[1];
  let changed = false;
  for (const number of numbers) {
    const widget = node.widgets?.find((each) => each.name === `weight_${number}`);
    if (widget && Boolean(widget.hidden) !== number > most) {
      widget.hidden = number > most;
      widget.options.hidden = widget.hidden;
      // Older pages leave room for a hidden widget, but for this.
      if (widget.hidden) widget.computeSize = () => [0, -4];
      else delete widget.computeSize;
      changed = true;
    }
    const slot = slotOf(node, `reward_${number}`);
    if (number > most && slot >= 0) take(node, number, slot);
    else if (number <= most && slot < 0) insert(node, number);
    else continue;
    changed = true;
  }
  if (!changed) return;
  const needed = node.computeSize()[1];
  const height = { fresh: needed, saved: node.size[1], linked: node.size[1] + needed - least }[kind];
  if (Math.max(needed, height) !== node.size[1]) node.setSize([node.size[0], Math.max(needed, height)]);
  node.setDirtyCanvas?.(true, true);
}

function take(node, number, slot) {
  const { localized_name, label, shape } = node.inputs[slot];
  if (!looks.has(node)) looks.set(node, {});
  looks.get(node)[number] = { ...(localized_name && { localized_name }), ...(label && { label }), shape };
  node.removeInput(slot);
}

// LiteGraph adds inputs at the end only: the new one moves behind the reward before it, and the links learn their new places.
function insert(node, number) {
  node.addInput(`reward_${number}`, "G2RPO_REWARD", looks.get(node)?.[number] ?? { shape: 7 });
  const [made] = node.inputs.splice(-1, 1);
  node.inputs.splice(slotOf(node, `reward_${number - 1}`) + 1, 0, made);
  node.inputs.forEach((input, slot) => {
    const link = input.link == null ? null : node.graph?.links.get?.(input.link) ?? node.graph?.links[input.link];
    if (link) link.target_slot = slot;
  });
}

// Keeps a node arranged. After the hook, not in it: whoever connects still counts with the old places.
export function grows(node) {
  let kind = "fresh";
  let waiting = false;
  const soon = (next) => {
    kind = next ?? kind;
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      if (node.graph) arrange(node, kind);
      kind = "linked";
    }, 0);
  };
  after(node, "onConnectionsChange", () => soon());
  after(node, "onAdded", () => soon());
  // At once, for the page notes what it has opened right after.
  after(node, "onConfigure", () => {
    if (node.graph) arrange(node, "saved");
    soon("saved");
  });
}
