// Draws the panels of a run as SVG: lines, bands and marks are styled by class, so that the page's theme reaches them.

import { allSteps, bandPath, decimate, heights, limits, linePath, nearest, number, panels, scale, smooth, spanFor, stepLimits, ticks } from "./curve.mjs";
import { svg } from "./dom.mjs";

const LEFT = 46;
const RIGHT = 8;
const TOP = 6;
const BOTTOM = 16;
const GAP = 10;
const MAX_MARKS = 60;

// Fills `place` with the drawing of `series`; returns how to find the step under a horizontal position, and how high the drawing is: at least `height`.
export function draw(place, series, { width, height, hidden, cursor, clip }) {
  const shown = panels(series, hidden);
  const lines = shown.flatMap((panel) => panel.lines);
  const across = scale(stepLimits(lines), [LEFT, width - RIGHT]);
  const parts = [];
  let top = TOP;
  for (const [i, tall] of heights(shown, height - TOP - BOTTOM - GAP * (shown.length - 1)).entries()) {
    parts.push(drawPanel(shown[i], { across, width, cursor, clip: `${clip}-${i}`, top, tall }));
    top += tall + GAP;
  }
  const whole = Math.max(height, Math.round(top - GAP + BOTTOM));
  if (lines.length) parts.push(drawSteps(lines, across, { width, height: whole, cursor }));
  place.setAttribute("viewBox", `0 0 ${width} ${whole}`);
  place.replaceChildren(...parts);
  const steps = allSteps(new Map(lines.map((line) => [line.key, line])));
  return { steps, whole, stepAt: (x) => (steps.length ? steps[nearest(steps, scale([LEFT, width - RIGHT], stepLimits(lines))(x))] : null) };
}

function drawPanel(panel, { across, width, cursor, clip, top, tall }) {
  const [low, high] = limits(panel.lines);
  const up = scale([low, high], [top + tall, top]);
  const group = svg("g");
  group.style.setProperty("--g2rpo-colour", panel.colour);
  group.append(svg("clipPath", { id: clip }, svg("rect", { x: LEFT - 4, y: top, width: Math.max(0, width - LEFT - RIGHT + 8), height: Math.max(0, tall) })));
  for (const value of ticks(low, high, Math.max(2, tall / 28))) {
    group.append(svg("line", { class: "g2rpo-rule", x1: LEFT, x2: width - RIGHT, y1: up(value), y2: up(value) }));
    group.append(svg("text", { x: LEFT - 6, y: up(value) + 3.5, "text-anchor": "end" }, number(value)));
  }
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  for (const line of panel.lines) {
    inside.append(...(line.kind === "heldout" ? drawHeldout(line, across, up) : drawReward(line, across, up, width - LEFT - RIGHT)));
  }
  group.append(inside);
  if (cursor !== null && panel.lines.length) group.append(...drawCursor(panel, cursor, { across, up, top, tall }));
  return group;
}

function drawReward(line, across, up, columns) {
  const span = spanFor(line.values.length);
  const middle = smooth(line.values, span);
  const spread = smooth(line.spreads, span);
  const kept = decimate(line.steps, line.values, columns);
  const points = (height) => kept.map((i) => [across(line.steps[i]), up(height(i))]);
  const band = bandPath(points((i) => middle[i] + spread[i]), points((i) => middle[i] - spread[i]));
  const parts = [
    svg("path", { class: "g2rpo-band", d: band }),
    svg("path", { class: "g2rpo-line", "data-part": "raw", d: linePath(points((i) => line.values[i])) }),
    svg("path", { class: "g2rpo-line", "data-part": "smooth", "data-series": line.key, d: linePath(points((i) => middle[i])) }),
  ];
  if (line.steps.length === 1) parts.push(svg("circle", { class: "g2rpo-mark", cx: across(line.steps[0]), cy: up(line.values[0]), r: 3 }));
  return parts;
}

function drawHeldout(line, across, up) {
  const points = line.steps.map((step, i) => [across(step), up(line.values[i])]);
  const parts = [svg("path", { class: "g2rpo-line", "data-part": "heldout", "data-series": line.key, d: linePath(points) })];
  const every = Math.ceil(points.length / MAX_MARKS);
  points.forEach(([x, y], i) => {
    if (i % every && i !== points.length - 1) return;
    const [top, bottom] = [up(line.values[i] + line.spreads[i]), up(line.values[i] - line.spreads[i])];
    if (line.spreads[i] > 0) parts.push(svg("path", { class: "g2rpo-line", "data-part": "interval", d: linePath([[x, top], [x, bottom]]) }));
    parts.push(svg("circle", { class: "g2rpo-mark", cx: x, cy: y, r: 3 }));
  });
  return parts;
}

function drawCursor(panel, cursor, { across, up, top, tall }) {
  const x = across(cursor);
  const parts = [svg("line", { class: "g2rpo-cursor", x1: x, x2: x, y1: top, y2: top + tall })];
  for (const line of panel.lines) {
    const i = nearest(line.steps, cursor);
    parts.push(svg("circle", { class: "g2rpo-mark", "data-part": "cursor", cx: across(line.steps[i]), cy: up(line.values[i]), r: 3.2 }));
  }
  return parts;
}

function drawSteps(lines, across, { width, height, cursor }) {
  const group = svg("g");
  const [first, last] = stepLimits(lines);
  const at = (step) => Math.max(LEFT, Math.min(width - RIGHT - 14, across(step)));
  for (const step of ticks(first, last, (width - LEFT - RIGHT) / 70, true)) {
    if (cursor !== null && Math.abs(at(step) - at(cursor)) < 36) continue;
    group.append(svg("text", { x: at(step), y: height - 3, "text-anchor": "middle" }, String(step)));
  }
  if (cursor !== null) group.append(svg("text", { class: "g2rpo-at", x: at(cursor), y: height - 3, "text-anchor": "middle" }, `step ${cursor}`));
  return group;
}
