// The curve's arithmetic and words: rows in, series, scales, paths and sentences out. No page in here, so that Node can test it.

// Mid-tones that stand out on dark and on light ground and in the common kinds of colour blindness; the style sheet mixes the theme's text colour in.
export const COLOURS = ["#2f86c8", "#d55e00", "#0a9a72", "#b85f97", "#8a6fd1", "#9a7a12"];

const LEAST_PANEL = 40;
const LABELS = { reward: "", heldout: "held-out " };
const SPREAD = { reward: "std", heldout: "ci95" };

export function emptySeries() {
  return new Map();
}

// Adds rows of metrics: "reward/<name>/mean" with its std, "heldout/<name>/mean" with its ci95. A run's last step has two
// rows, so a step that comes again adds to what it said; an earlier step means that the run went back to a checkpoint, and what came after it is dropped.
export function collect(series, rows) {
  for (const row of rows) {
    const step = row?.step;
    if (!Number.isFinite(step)) continue;
    for (const line of series.values()) cut(line, (last) => last > step);
    for (const [metric, value] of Object.entries(row)) {
      const parts = /^(reward|heldout)\/(.+)\/mean$/s.exec(metric);
      if (!parts || !Number.isFinite(value)) continue;
      const [, kind, name] = parts;
      const line = lineOf(series, kind, name);
      cut(line, (last) => last === step);
      const spread = row[`${kind}/${name}/${SPREAD[kind]}`];
      line.steps.push(step);
      line.values.push(value);
      line.spreads.push(Number.isFinite(spread) ? Math.max(0, spread) : 0);
    }
  }
  return series;
}

// What the watch says at the newest evaluation: {step, text}, or null; rows without held-out rewards say nothing about it.
export function alarmAfter(alarm, rows) {
  let found = alarm;
  for (const row of rows) {
    if (!Number.isFinite(row?.step)) continue;
    const evaluation = Object.keys(row).some((metric) => metric.startsWith("heldout/"));
    if (evaluation) found = typeof row.alarm === "string" ? { step: row.step, text: row.alarm } : null;
    else if (found && row.step < found.step) found = null;
  }
  return found;
}

function lineOf(series, kind, name) {
  const key = `${kind}/${name}`;
  if (!series.has(key)) {
    series.set(key, { key, kind, name, label: LABELS[kind] + name, steps: [], values: [], spreads: [] });
  }
  return series.get(key);
}

function cut(line, drop) {
  while (line.steps.length && drop(line.steps.at(-1))) {
    line.steps.pop();
    line.values.pop();
    line.spreads.pop();
  }
}

// The lines in the order of the legend: by reward, what is trained on before what is held out.
export function inOrder(series) {
  const names = [...new Set([...series.values()].map((line) => line.name))];
  const place = (line) => 2 * names.indexOf(line.name) + (line.kind === "heldout" ? 1 : 0);
  return [...series.values()].sort((a, b) => place(a) - place(b));
}

// One panel per reward name: rewards have scales of their own. Training reward and held-out reward of one name share panel and colour.
export function panels(series, hidden = new Set()) {
  const names = [...new Set([...series.values()].map((line) => line.name))];
  return names
    .map((name, index) => ({
      name,
      colour: COLOURS[index % COLOURS.length],
      trained: series.has(`reward/${name}`),
      lines: inOrder(series).filter((line) => line.name === name && line.steps.length && !hidden.has(line.key)),
    }))
    .filter((panel) => panel.lines.length);
}

// How high each panel is in `room` pixels: rewards that are trained on take 60 % together where there are others too, and none is less than can be read.
export function heights(shown, room) {
  const trained = shown.filter((panel) => panel.trained).length;
  const others = shown.length - trained;
  const share = (panel) => (!trained || !others ? 1 / shown.length : panel.trained ? 0.6 / trained : 0.4 / others);
  return shown.map((panel) => Math.max(LEAST_PANEL, share(panel) * room));
}

// Exponential average, corrected at its start so that it begins at the first value.
export function smooth(values, span) {
  const keep = 1 - 2 / (Math.max(1, span) + 1);
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

export function spanFor(count) {
  return Math.min(60, Math.max(1, count / 5));
}

// Vertical limits: every mean and held-out interval is inside; the band of the samples may widen them by at most 60 % on either side.
export function limits(lines) {
  let low = Infinity;
  let high = -Infinity;
  let bandLow = Infinity;
  let bandHigh = -Infinity;
  for (const line of lines) {
    line.values.forEach((value, i) => {
      const reach = line.kind === "heldout" ? line.spreads[i] : 0;
      low = Math.min(low, value - reach);
      high = Math.max(high, value + reach);
      bandLow = Math.min(bandLow, value - line.spreads[i]);
      bandHigh = Math.max(bandHigh, value + line.spreads[i]);
    });
  }
  if (low > high) return [0, 1];
  const range = high - low || Math.max(Math.abs(high) * 0.1, bandHigh - bandLow, 1e-6);
  const pad = 0.06 * range;
  return [Math.max(bandLow, low - 0.6 * range, -1e300) - pad, Math.min(bandHigh, high + 0.6 * range, 1e300) + pad];
}

// Horizontal limits: from the first step seen (0 if there is one) to the last, never an empty range.
export function stepLimits(lines) {
  const first = Math.min(...lines.map((line) => line.steps[0]));
  const last = Math.max(...lines.map((line) => line.steps.at(-1)));
  return Number.isFinite(first) ? [Math.min(first, last - 1), last] : [0, 1];
}

export function scale([from, to], [start, end]) {
  const factor = (end - start) / (to - from || 1);
  return (value) => start + (value - from) * factor;
}

// Round numbers within [low, high], at most about `count` of them.
export function ticks(low, high, count, whole = false) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0) || !Number.isFinite(rough)) return [];
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  const found = [];
  for (let i = first; i <= last && found.length < 50; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Points for a drawing of `columns` pixels: all where they fit, otherwise the lowest and highest of each column in their order.
export function decimate(xs, ys, columns) {
  const indices = [...xs.keys()];
  if (xs.length <= 2 * columns || columns < 1) return indices;
  const kept = new Set([0, xs.length - 1]);
  const toColumn = scale([xs[0], xs.at(-1)], [0, columns - 1]);
  let column = -1;
  let low = 0;
  let high = 0;
  for (const i of indices) {
    const here = Math.floor(toColumn(xs[i]));
    if (here !== column) {
      kept.add(low).add(high);
      [column, low, high] = [here, i, i];
    }
    if (ys[i] < ys[low]) low = i;
    if (ys[i] > ys[high]) high = i;
  }
  return [...kept.add(low).add(high)].sort((a, b) => a - b);
}

const coordinate = (value) => Math.round(Math.max(-1e6, Math.min(1e6, value)) * 10) / 10;

export function linePath(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${coordinate(x)} ${coordinate(y)}`).join("");
}

export function bandPath(upper, lower) {
  return upper.length ? `${linePath([...upper, ...lower.toReversed()])}Z` : "";
}

// The place of the step nearest to `step` in an ascending list; -1 in an empty one.
export function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : Math.min(low, steps.length - 1);
}

export function allSteps(series) {
  return [...new Set([...series.values()].flatMap((line) => line.steps))].sort((a, b) => a - b);
}

export function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "";
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600 + 1 / 120)} h ${Math.round(seconds / 60) % 60} min`;
}

const PHASES = { rollout: "rolling out", score: "scoring", update: "updating", evaluate: "evaluating", done: "finished", stopped: "stopped" };

// The line above the curve and the share of the run that is done. `progress` is the newest event, if any; the rest is what the run folder says.
export function status({ progress, step, totalSteps, finished }) {
  const total = progress?.total ?? totalSteps;
  const at = progress?.step ?? step ?? 0;
  const running = progress && progress.phase !== "done" && progress.phase !== "stopped";
  const words = [total ? `step ${at} of ${total}` : `step ${at}`];
  if (progress) {
    const amount = progress.of > 0 ? ` ${progress.done} / ${progress.of}` : progress.done > 0 ? ` (${progress.done} forwards)` : "";
    words.push((PHASES[progress.phase] ?? String(progress.phase)) + (running ? amount : ""));
  }
  if (!progress && finished) words.push("finished");
  if (running && duration(progress.seconds_left)) words.push(`${duration(progress.seconds_left)} left`);
  const within = running && progress.phase !== "evaluate" && progress.of > 0 ? Math.min(1, progress.done / progress.of) : 0;
  const share = total ? Math.min(1, (at + within) / total) : finished ? 1 : 0;
  return { text: words.join(" · "), share, running: Boolean(running) };
}

// A line at the cursor's step, or at its newest: its value, smoothed where every step has one, and how far it has come since the start, in numbers.
export function course(line, step) {
  const i = step === null ? line.steps.length - 1 : nearest(line.steps, step);
  if (i < 0) return null;
  const span = line.kind === "heldout" ? 1 : spanFor(line.values.length);
  const value = smooth(line.values, span)[i];
  // One step's reward is noisy, so the start is the mean of as many steps as are smoothed over.
  const first = line.values.slice(0, Math.min(i + 1, Math.max(1, Math.round(span))));
  return { first: i === 0, value, change: value - first.reduce((sum, each) => sum + each, 0) / first.length, spread: line.kind === "heldout" ? line.spreads[i] : 0 };
}

// The course in words: {value: "0.512", spread: "± 0.02", change: "+0.21"}; at its first step there is no change to tell.
export function reading(line, step) {
  const at = course(line, step);
  if (!at) return { value: "–", spread: "", change: "" };
  return { value: digits(at.value, 3), spread: at.spread > 0 ? `± ${digits(at.spread, 2)}` : "", change: at.first ? "" : signed(at.change) };
}

// With its sign; what is nothing beside rounding is 0.
function signed(value) {
  const size = Math.abs(value);
  return size < 1e-9 ? "0" : `${value < 0 ? "−" : "+"}${digits(size, 2)}`;
}

// Like number(), but with its trailing zeros, so that the width of a changing value stays.
function digits(value, count) {
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? (size < 100 ? value.toPrecision(count) : String(Math.round(value))) : number(value);
}

// The whole reading in words.
export function sentence(series, hidden, step, last) {
  const said = inOrder(series)
    .filter((line) => line.steps.length && !hidden.has(line.key))
    .map((line) => {
      const at = step === null ? line.steps.at(-1) : line.steps[nearest(line.steps, step)];
      const { value, spread, change } = reading(line, step);
      return `${[line.label, value, spread].filter(Boolean).join(" ")}${change && `, change ${change}`}${at === (step ?? last) ? "" : ` at step ${at}`}`;
    });
  return [`step ${step ?? last}`, ...said].join(", ");
}
