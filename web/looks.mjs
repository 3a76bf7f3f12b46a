// Colours of wires and of fresh nodes, names over boxes of several lines where the classic canvas draws none, and what a preset makes grey.

import { PRESET, ROLE_OF, ROLES, WIRES } from "./roles.mjs";
import { after } from "./widgets.mjs";

// A palette empties the colours of types that it does not know, so this is called now and then; a palette that names ours keeps its own.
export function colourWires(canvas) {
  const style = document.documentElement.style;
  for (const [type, colour] of Object.entries(WIRES)) {
    for (const table of [canvas.default_connection_color_byType, canvas.constructor.link_type_colors]) if (table && !table[type]) table[type] = colour;
    // The newer renderer reads it from here.
    const name = `--color-datatype-${type}`;
    if (!style.getPropertyValue(name)) style.setProperty(name, colour);
  }
}

// Colours a fresh node by its role. A node that is loaded or pasted has what was saved, which may be no colour.
export function colourNode(node) {
  const role = ROLES[ROLE_OF[node.comfyClass]];
  if (!role || node.color || node.bgcolor) return;
  Object.assign(node, role);
  after(node, "onConfigure", (saved) => {
    for (const part of Object.keys(role)) if (!saved[part]) node[part] = undefined;
  });
}

const named = new WeakSet();

// Writes the names of boxes of several lines into the gap over them; the newer renderer writes them itself.
export function nameBoxes(node, page) {
  if (named.has(node) || !node.widgets?.some(isBox)) return;
  named.add(node);
  after(node, "onDrawForeground", (context) => {
    if (page.LiteGraph?.vueNodesMode || node.flags?.collapsed) return;
    context.save();
    context.font = "10px Inter, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillStyle = page.LiteGraph?.WIDGET_SECONDARY_TEXT_COLOR ?? "#999";
    for (const widget of node.widgets) if (isBox(widget) && node.isWidgetVisible(widget)) context.fillText(widget.label || widget.name, 14, widget.y + 4);
    context.restore();
  });
}

// Greys the numbers that do not count while a preset is chosen. Called now and then: the widget may be changed by an undo or from the side panel.
export function greyTyped(node) {
  const preset = node.widgets?.find((widget) => widget.name === PRESET.widget)?.value;
  if (preset === undefined) return;
  const grey = preset !== PRESET.none;
  const changed = node.widgets.filter((widget) => PRESET.replaces.includes(widget.name) && Boolean(widget.disabled) !== grey);
  for (const widget of changed) widget.disabled = grey;
  if (changed.length) node.setDirtyCanvas?.(true, true);
}

const isBox = (widget) => widget.type === "customtext";
