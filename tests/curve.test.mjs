// Run by test_page.py with Node's own test runner: the page's arithmetic and its fetching, without a page.

import assert from "node:assert/strict";
import { test } from "node:test";
import * as curve from "../web/curve.mjs";
import { Feed } from "../web/feed.mjs";

const row = (step, value, more = {}) => ({ step, "reward/brightness/mean": value, "reward/brightness/std": 0.1, ...more });
const filledRows = (count) => Array.from({ length: count }, (_, i) => row(i + 1, i / count));
const filled = (count) => curve.collect(curve.emptySeries(), filledRows(count));

test("rows become one line per reward and one per held-out reward", () => {
  const series = curve.collect(curve.emptySeries(), [{ step: 0, "heldout/a/b/mean": 1, "heldout/a/b/ci95": 0.5 }, row(1, 2)]);
  assert.deepEqual([...series.keys()], ["heldout/a/b", "reward/brightness"]);
  assert.deepEqual(series.get("heldout/a/b").spreads, [0.5]);
  assert.deepEqual(series.get("reward/brightness").values, [2]);
});

test("what is not a number leaves a gap", () => {
  const odd = [null, {}, { step: "1" }, row(1, null), row(2, "3"), row(3, Infinity), row(4, 5), { step: 5, "reward//mean": 1, "reward/x/median": 2 }];
  assert.deepEqual(curve.collect(curve.emptySeries(), odd).get("reward/brightness").steps, [4]);
});

test("a second row of a step adds to it, an earlier step takes the run back", () => {
  const series = filled(5);
  curve.collect(series, [{ step: 5, "heldout/brightness/mean": 9 }]);
  assert.equal(series.get("reward/brightness").steps.length, 5);
  curve.collect(series, [row(3, 7)]);
  assert.deepEqual(series.get("reward/brightness").steps, [1, 2, 3]);
  assert.deepEqual(series.get("heldout/brightness").steps, []);
});

test("the newest evaluation says whether there is an alarm, and going back to a checkpoint takes it away", () => {
  const look = (step, alarm) => ({ step, "heldout/a/mean": 1, ...(alarm === undefined ? {} : { alarm }) });
  const after = (...rows) => curve.alarmAfter(null, rows);
  assert.deepEqual(after(look(0), row(1, 2), look(1, "it games"), row(2, 3)), { step: 1, text: "it games" });
  assert.equal(after(look(1, "it games"), look(2)), null);
  assert.equal(after(look(4, "it games"), row(3, 1)), null);
  assert.equal(after(null, {}, look("1", "it games"), look(1, 7), { step: 1, alarm: "no evaluation" }), null);
});

test("training and held-out reward of one name share a panel and a colour, hidden lines leave it", () => {
  const series = curve.collect(curve.emptySeries(), [{ step: 0, "heldout/a/mean": 1, "heldout/b/mean": 1 }, { step: 1, "reward/a/mean": 1 }]);
  const keys = (hidden) => curve.panels(series, new Set(hidden)).map((panel) => panel.lines.map((line) => line.key));
  assert.deepEqual(keys([]), [["reward/a", "heldout/a"], ["heldout/b"]]);
  assert.deepEqual(keys(["reward/a", "heldout/b"]), [["heldout/a"]]);
  assert.equal(curve.panels(series, new Set(["reward/a", "heldout/a"]))[0].colour, curve.COLOURS[1]);
});

test("smoothing starts at the first value, keeps a constant and follows a step", () => {
  assert.deepEqual(curve.smooth([3, 3, 3], 7).map((x) => Math.round(x * 1e9) / 1e9), [3, 3, 3]);
  assert.deepEqual(curve.smooth([1, 5, 2], 1), [1, 5, 2]);
  const up = curve.smooth([0, ...Array(50).fill(1)], 5);
  assert.ok(up.every((x, i) => i === 0 || x > up[i - 1]) && up.at(-1) > 0.999);
});

test("the limits hold every mean; a wide band does not squeeze the curve", () => {
  const series = curve.collect(curve.emptySeries(), [row(1, 0.4, { "reward/brightness/std": 50 }), row(2, 0.6, { "reward/brightness/std": 50 })]);
  const [low, high] = curve.limits([...series.values()]);
  assert.ok(low < 0.4 && high > 0.6 && high - low < 0.6);
});

test("a flat curve, a single point and no point have limits too", () => {
  for (const values of [[0], [5, 5], [-2, -2, -2], [1e-12]]) {
    const line = { kind: "reward", steps: values.map((_, i) => i), values, spreads: values.map(() => 0) };
    const [low, high] = curve.limits([line]);
    assert.ok(low < values[0] && high > values[0]);
    const [first, last] = curve.stepLimits([line]);
    assert.ok(first < last);
  }
  assert.deepEqual(curve.limits([]), [0, 1]);
  assert.deepEqual(curve.stepLimits([]), [0, 1]);
});

test("ticks are round, inside and few", () => {
  assert.deepEqual(curve.ticks(0, 1, 5), [0, 0.2, 0.4, 0.6, 0.8, 1]);
  assert.deepEqual(curve.ticks(0.31, 0.39, 3), [0.35]);
  assert.deepEqual(curve.ticks(0, 3, 10, true), [0, 1, 2, 3]);
  for (const [low, high] of [[-3, 17], [1e-9, 3e-9], [-1e8, 1e8]]) {
    const found = curve.ticks(low, high, 5);
    assert.ok(found.length >= 2 && found.length <= 8 && found.every((x) => x >= low * 1.0001 - 1e-12 && x <= high * 1.0001), `${found}`);
  }
  for (const odd of [[1, 1], [2, 1], [0, NaN], [0, Infinity]]) assert.deepEqual(curve.ticks(...odd, 5), []);
});

test("decimation keeps the ends and every extreme, in order, within two points per column", () => {
  const count = 100_000;
  const xs = Array.from({ length: count }, (_, i) => i);
  const ys = xs.map((x) => Math.sin(x / 777));
  ys[54_321] = 9;
  ys[12_345] = -9;
  const kept = curve.decimate(xs, ys, 300);
  assert.ok(kept.length <= 602);
  assert.ok([0, 12_345, 54_321, count - 1].every((i) => kept.includes(i)));
  assert.deepEqual(kept, [...kept].sort((a, b) => a - b));
  assert.deepEqual(curve.decimate([1, 2], [1, 2], 300), [0, 1]);
});

test("paths hold numbers only", () => {
  assert.equal(curve.linePath([[1, 2], [3.14159, -4]]), "M1 2L3.1 -4");
  assert.equal(curve.bandPath([[0, 1], [1, 1]], [[0, 0], [1, 0]]), "M0 1L1 1L1 0L0 0Z");
  assert.equal(curve.bandPath([], []), "");
  assert.match(curve.linePath([[1e300, -1e300]]), /^M1000000 -1000000$/);
});

test("the nearest step is found in any list", () => {
  const steps = [0, 10, 20, 30];
  assert.deepEqual([-5, 4, 6, 15, 29, 99].map((at) => curve.nearest(steps, at)), [0, 0, 1, 1, 3, 3]);
  assert.equal(curve.nearest([], 3), -1);
});

test("numbers and times are short", () => {
  assert.deepEqual([0, 0.6432, 12345, 1234567, 0.00001, NaN].map(curve.number), ["0", "0.643", "12300", "1.2e+6", "1.0e-5", "–"]);
  assert.deepEqual([0.2, 59, 61, 3600, 7205, 35990, NaN, -1].map(curve.duration), ["1 s", "59 s", "1 min", "60 min", "2 h 0 min", "10 h 0 min", "", ""]);
});

test("the status line says where the run is", () => {
  const progress = { step: 3, total: 20, phase: "rollout", done: 136, of: 544, seconds_left: 130 };
  assert.deepEqual(curve.status({ progress }), { text: "step 3 of 20 · rolling out 136 / 544 · 2 min left", share: 0.1625, running: true });
  const uncounted = curve.status({ progress: { ...progress, of: null } });
  assert.deepEqual(uncounted, { text: "step 3 of 20 · rolling out (136 forwards) · 2 min left", share: 0.15, running: true });
  assert.deepEqual(curve.status({ progress: { ...progress, phase: "stopped" } }), { text: "step 3 of 20 · stopped", share: 0.15, running: false });
  assert.deepEqual(curve.status({ step: 20, totalSteps: 20, finished: true }), { text: "step 20 of 20 · finished", share: 1, running: false });
  assert.equal(curve.status({}).text, "step 0");
});

test("the cursor reads each line at its own nearest step, smoothed where every step is measured", () => {
  const series = curve.collect(filled(30), [{ step: 0, "heldout/brightness/mean": 0.25 }, ...filledRows(30), { step: 30, "heldout/brightness/mean": 0.5, "heldout/brightness/ci95": 0.02 }]);
  assert.equal(curve.sentence(series, new Set(), 12, 30), "step 12, brightness 0.291, change +0.21, held-out brightness 0.250 at step 0");
  assert.equal(curve.sentence(series, new Set(["reward/brightness"]), null, 30), "step 30, held-out brightness 0.500 ± 0.020, change +0.25");
});

for (const [name, values, change] of [
  ["a rise", [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], /^\+0\.9|^\+1/],
  ["a fall", [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2], /^−2\.|^−3/],
  ["nothing", Array(20).fill(0.3), /^0$/],
]) {
  test(`the legend tells how far a reward has come since the start: ${name}`, () => {
    const series = curve.collect(curve.emptySeries(), values.map((value, i) => row(i, value)));
    assert.match(curve.reading(series.get("reward/brightness"), null).change, change);
    assert.equal(curve.reading(series.get("reward/brightness"), 0).change, "");
  });
}

test("the noise of the first step alone is not taken for a change", () => {
  const noisy = [2, ...Array.from({ length: 99 }, (_, i) => (i % 2 ? 1.1 : 0.9))];
  const { change } = curve.course({ kind: "reward", steps: [...noisy.keys()], values: noisy, spreads: noisy.map(() => 0) }, null);
  assert.ok(Math.abs(change) < 0.12, String(change));
});

for (const [name, trained, shares] of [
  ["one of two", [true, false], [0.6, 0.4]],
  ["one of four", [false, true, false, false], [0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3]],
  ["two of three", [true, true, false], [0.3, 0.3, 0.4]],
  ["all", [true, true], [0.5, 0.5]],
  ["none", [false, false, false], [1 / 3, 1 / 3, 1 / 3]],
  ["alone", [true], [1]],
]) {
  test(`what is trained on has 60 % of the height where there is more: ${name}`, () => {
    const found = curve.heights(trained.map((each) => ({ trained: each })), 1000);
    assert.deepEqual(found.map(Math.round), shares.map((share) => Math.round(1000 * share)));
    // In a low chart every panel can still be read, and the chart scrolls.
    assert.ok(curve.heights(trained.map((each) => ({ trained: each })), 60).every((height) => height >= 40));
  });
}

function luminance(colour) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

test("every colour stands out on dark and on light ground, the theme's text colour mixed in as the style sheet does", () => {
  const mixed = (colour, text) => `#${[1, 3, 5].map((i) => Math.round(0.8 * parseInt(colour.slice(i, i + 2), 16) + 0.2 * text).toString(16).padStart(2, "0")).join("")}`;
  for (const colour of curve.COLOURS) {
    for (const [ground, text] of [["#222222", 255], ["#ebebeb", 0x22]]) {
      const [one, other] = [luminance(mixed(colour, text)), luminance(ground)].sort((a, b) => b - a);
      assert.ok((one + 0.05) / (other + 0.05) >= 3, `${colour} on ${ground}`);
    }
  }
});

// A server with `rows`, which answers at most `cap` of them at once.
function serverOf(rows, cap = 100) {
  const state = { rows, created: 1, asked: [], finished: false };
  state.get = async (path) => {
    const after = Number(new URLSearchParams(path.split("?")[1]).get("after"));
    state.asked.push(after);
    const part = state.rows.slice(after, after + cap);
    const total = state.rows.length;
    const data = { rows: part, next: Math.min(after, total) + part.length, total, created: state.created, finished: state.finished, samples: [] };
    return { status: 200, data: after > total ? { ...data, reset: true } : data };
  };
  return state;
}

const numbered = (count) => Array.from({ length: count }, (_, i) => row(i + 1, i));
const stepsOf = (feed) => feed.series.get("reward/brightness")?.steps.length ?? 0;

test("a feed fetches what it lacks, piece by piece", async () => {
  const server = serverOf(numbered(250));
  const feed = new Feed("run", server.get);
  await feed.refresh();
  assert.deepEqual([stepsOf(feed), server.asked], [250, [0, 100, 200]]);
  server.rows = numbered(251);
  await feed.refresh();
  assert.deepEqual([stepsOf(feed), server.asked.at(-1)], [251, 250]);
});

test("events lead to a question only when there are new rows", async () => {
  const server = serverOf(numbered(2));
  const feed = new Feed("run", server.get);
  await feed.refresh();
  feed.take({ phase: "rollout", row: 2 });
  assert.equal(server.asked.length, 1);
  server.rows = numbered(3);
  feed.take({ phase: "rollout", row: 3 });
  await feed.fetching;
  assert.equal(stepsOf(feed), 3);
});

test("calls while fetching lead to one more round, not to many", async () => {
  const server = serverOf(numbered(2));
  const feed = new Feed("run", server.get);
  await Promise.all([feed.refresh(), feed.refresh(), feed.refresh(), feed.refresh()]);
  assert.equal(server.asked.length, 2);
});

test("a run that was cut or replaced is read again from its start", async () => {
  const server = serverOf(numbered(9));
  const feed = new Feed("run", server.get);
  await feed.refresh();
  server.rows = numbered(4);
  await feed.refresh();
  assert.equal(stepsOf(feed), 4);
  Object.assign(server, { rows: numbered(6), created: 2 });
  await feed.refresh();
  assert.equal(stepsOf(feed), 6);
});

test("a server without our routes, or none, is a sentence and no exception", async () => {
  for (const [answer, words] of [
    [{ status: 404, data: null }, /does not answer questions/],
    [{ status: 404, data: { error: "x" } }, /No run of this name yet/],
    [{ status: 0, data: null }, /server does not answer/],
    [{ status: 200, data: { rows: "no" } }, /answered 200/],
  ]) {
    const feed = new Feed("run", async () => answer);
    await feed.refresh();
    assert.match(feed.problem, words);
  }
});

test("a prompt that ends without a last word counts as stopped", () => {
  const feed = new Feed("run", serverOf([]).get);
  feed.stop();
  assert.equal(feed.progress, null);
  feed.take({ phase: "rollout", step: 3, row: 3 });
  feed.stop();
  assert.equal(feed.progress.phase, "stopped");
});
