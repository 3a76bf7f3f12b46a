// Puts elements of ours on nodes as DOM widgets, and keeps them where both renderers make nodes anew. No ComfyUI is imported here.

// Room that the classic canvas leaves around a DOM widget.
const MARGIN = 10;

// Calls `action` after what a node does already at one of LiteGraph's own hooks.
export function after(node, hook, action) {
  const before = node[hook];
  node[hook] = function chained(...given) {
    const answer = before?.apply(this, given);
    action(...given);
    return answer;
  };
}

export class Widgets {
  // `wheel` is what the wheel does over a widget.
  constructor(wheel) {
    Object.assign(this, { wheel, roots: new Map(), left: new Map() });
  }

  // Puts `root` on the node under its other widgets, or above them. `height` is its least height in pixels, or its only one if `fixed`; `removed()` is
  // called when the node goes.
  attach(node, name, root, { height, width = 0, fixed = false, first = false, removed = () => {} }) {
    // In the panel at the right the same element would stand in a second place, and the node's would follow the panel's width.
    const getMinHeight = () => height + 2 * MARGIN;
    const options = { serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight, ...(fixed && { getMaxHeight: getMinHeight }) };
    const widget = node.addDOMWidget(name, name, root, options);
    // `options.serialize` keeps it out of the prompt, this out of the workflow.
    widget.serialize = false;
    if (first) raise(node, widget);
    // The newer renderer reads it from here.
    root.style.minHeight = `${height}px`;
    root.addEventListener("wheel", this.wheel, { passive: false });
    this.roots.set(root, { node, name });
    this.grow(node, width);
    setTimeout(() => this.adopt(root), 100);
    after(node, "onRemoved", () => {
      this.roots.delete(root);
      this.left.set(`${node.id} ${name}`, root);
      removed();
    });
  }

  // Makes a node that is too small for its widgets large enough, and no other.
  grow(node, width = 0) {
    const least = node.computeSize();
    const size = [Math.max(node.size[0], least[0], width), Math.max(node.size[1], least[1])];
    if (size[0] !== node.size[0] || size[1] !== node.size[1]) node.setSize(size);
    node.setDirtyCanvas?.(true, true);
  }

  look() {
    for (const root of this.roots.keys()) this.adopt(root);
  }

  // Undo, and opening a workflow with the same ids, make all nodes anew in one go. Nodes 2.0 then keeps the frame of the node of the same id, with the
  // old node's element in it and no place for the new one's: it takes the old one's place.
  adopt(root) {
    const { node, name } = this.roots.get(root) ?? {};
    if (!node) return;
    const old = this.left.get(`${node.id} ${name}`);
    if (!root.isConnected && old?.isConnected) old.replaceWith(root);
    if (root.isConnected) this.left.delete(`${node.id} ${name}`);
  }
}

// Lays a widget above the others. A workflow holds the values of widgets by their place in this list, and reads them without the widgets that have none:
// the place of ours is taken out again.
function raise(node, widget) {
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.widgets.unshift(widget);
  after(node, "onSerialize", (saved) => {
    if (Array.isArray(saved.widgets_values)) saved.widgets_values = saved.widgets_values.filter((_, i) => node.widgets[i]?.serialize !== false);
  });
}
