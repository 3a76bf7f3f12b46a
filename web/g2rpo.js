// Puts the live curve on Train LoRA, Run Monitor and Training Result, the ballot on Vote, where the file lies on what writes one, and what blocks say on them. The page side
// of nodes/host/routes.py and of the events "g2rpo.progress" and "g2rpo.text".

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { CopyPath, WRITERS } from "./copy_path.mjs";
import { Feed, problemOf, RUN_ID } from "./feed.mjs";
import { MIXER, grows } from "./grow.mjs";
import { colourNode, colourWires, greyTyped, nameBoxes } from "./looks.mjs";
import { HEIGHT, Monitor } from "./monitor.mjs";
import { Texts } from "./texts.mjs";
import { VOTER, Voting } from "./vote.mjs";
import { Widgets } from "./widgets.mjs";

const TRAINER = "G2RPO_TrainLoRA";
const MONITOR = "G2RPO_RunMonitor";
const SUBMITTER = "G2RPO_SubmitTraining";
const RESULT = "G2RPO_TrainingResult";
// The input over which the run of a node that only looks may come.
const WIRED = { [MONITOR]: "run_name", [RESULT]: "run" };
const LOOK_EVERY = 1000;
const POLL_EVERY = 5000;
const MAX_OFFERS = 6;
const NEWEST = "newest";
const GONE_ON = "It has gone on since the last Run. Press Run to see how it stands; its LoRA comes once it is done.";
const STYLES = [new URL("./g2rpo.css", import.meta.url), new URL("./node_parts.css", import.meta.url)];

const feeds = new Map();
const monitors = new Map();
const widgets = new Widgets(scrollCanvas);
const place = (node) => `${app.graph?.id ?? ""}:${node.id}`;
const voting = new Voting({ app, api, nodeOf, widgets, place });
const texts = new Texts({ nodeOf, widgets, place });
const files = new CopyPath({ app, nodeOf, get, widgets });

async function get(path) {
  try {
    const response = await api.fetchApi(path, { cache: "no-store" });
    const data = await response.json().catch(() => null);
    return { status: response.status, data };
  } catch {
    return { status: 0, data: null };
  }
}

function picture(run, folder, file, version) {
  const question = new URLSearchParams({ type: "output", subfolder: `g2rpo/${run}/images/${folder}`, filename: file, v: version });
  return api.apiURL(`/view?${question}`);
}

function feedOf(run) {
  if (!feeds.has(run)) {
    const feed = new Feed(run, get, () => showAll(feed));
    feeds.set(run, feed);
    feed.refresh();
  }
  return feeds.get(run);
}

function showAll(feed) {
  for (const [node, entry] of monitors) {
    if (entry.monitor.feed !== feed) continue;
    entry.monitor.invalidate();
    if (!entry.stood || entry.stood === standing(feed)) continue;
    entry.stood = null;
    texts.say(node, GONE_ON);
  }
}

const standing = (feed) => `${feed.step} ${feed.finished}`;

const runWidget = (node) => node.widgets?.find((widget) => widget.name === "run");
const asked = (node) => String(runWidget(node)?.value ?? "").trim();

// The run that a node shows: what is wired to it, else what its widget asks for, or the run that it started when it was last asked that.
function wanted(node) {
  const wired = wiredRun(node);
  if (wired !== null) return wired;
  const { g2rpo_run: started, g2rpo_asked: then } = node.properties ?? {};
  return node.comfyClass === TRAINER && started && (then ?? "") === asked(node) ? started : asked(node);
}

// The run that comes over the wire of a node that looks, "" before it is known; null where nothing is wired. Before Train LoRA has ended its own node tells it.
function wiredRun(node) {
  const name = WIRED[node.comfyClass];
  const slot = name ? node.findInputSlot?.(name) ?? -1 : -1;
  if (slot < 0 || node.inputs[slot].link == null) return null;
  const origin = node.getInputNode(slot);
  return origin?.comfyClass === TRAINER ? wanted(origin) : monitors.get(node)?.told ?? "";
}

// Writes the run into the node, so that the saved workflow and a reloaded page find it.
function remember(node, run) {
  if (node.comfyClass !== TRAINER || (wanted(node) === run && node.properties?.g2rpo_run === run)) return;
  node.properties ??= {};
  Object.assign(node.properties, { g2rpo_run: run, g2rpo_asked: asked(node) });
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

// Follows an execution id ("5", or "12:5" within a subgraph) to its node.
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function refreshEntry(node, entry) {
  const run = wanted(node);
  const listed = node.comfyClass === MONITOR && wiredRun(node) === null;
  if (listed && (run === NEWEST || run === "")) {
    entry.run = run;
    lookForRuns(node, entry);
  } else if (run !== entry.run) {
    entry.run = run;
    if (RUN_ID.test(run)) entry.monitor.show(feedOf(run));
    else entry.monitor.show(null, run ? "This is not the name of a run: use letters, digits, dots, dashes and underscores." : "The curve appears here when the training starts.");
  }
}

// Which run is the newest changes, so the list is asked for now and then.
async function lookForRuns(node, entry) {
  if (Date.now() - (entry.listed ?? 0) < POLL_EVERY && entry.listedFor === entry.run) return;
  Object.assign(entry, { listed: Date.now(), listedFor: entry.run });
  const { status, data } = await get("/g2rpo/runs");
  if (entry.run !== entry.listedFor || !["", NEWEST].includes(entry.run)) return;
  if (status !== 200) entry.monitor.show(null, problemOf(status, data));
  else if (!data.runs.length) entry.monitor.show(null, "No runs yet. Train LoRA on a Reward makes them.");
  else if (entry.run === NEWEST) entry.monitor.show(feedOf(data.runs[0].id));
  else entry.monitor.show(null, "Which run?", data.runs.slice(0, MAX_OFFERS).map((run) => offer(node, run)));
}

function offer(node, { id, step, steps, finished }) {
  const label = `${id} · step ${step ?? 0}${steps ? ` of ${steps}` : ""}${finished ? " · finished" : ""}`;
  return { label, choose: () => choose(node, id) };
}

function choose(node, run) {
  const widget = runWidget(node);
  if (!widget) return;
  widget.value = run;
  widget.callback?.(run, app.canvas, node);
  refreshEntry(node, monitors.get(node));
}

function addMonitor(node) {
  const monitor = new Monitor({ picture });
  monitors.set(node, { monitor, run: null });
  const removed = () => {
    monitors.delete(node);
    monitor.dispose();
  };
  widgets.attach(node, "g2rpo_curve", monitor.root, { height: HEIGHT, width: 440, first: node.comfyClass === TRAINER, removed });
}

// Over the widget the wheel zooms the classic canvas as everywhere else on it; Nodes 2.0 sees the event by itself.
function scrollCanvas(event) {
  if (window.LiteGraph?.vueNodesMode || event.target.closest?.(".g2rpo-strip, .g2rpo-choices")) return;
  const text = event.target.closest?.(".g2rpo-text, .g2rpo-chart, .g2rpo-legend");
  if (text && text.scrollHeight > text.clientHeight && !event.ctrlKey) return event.stopPropagation();
  app.canvas?.processMouseWheel?.(event);
}

function look() {
  const now = Date.now();
  widgets.look();
  colourWires(app.canvas);
  for (const node of app.canvas?.graph?._nodes ?? []) if (node.comfyClass === SUBMITTER) greyTyped(node);
  for (const [node, entry] of monitors) {
    greyTyped(node);
    if (!entry.monitor.root.isConnected) continue;
    refreshEntry(node, entry);
    const feed = entry.monitor.feed;
    // A finished run may go on in somebody else's page.
    const every = feed?.finished && !feed.problem ? 6 * POLL_EVERY : POLL_EVERY;
    if (!feed || document.hidden || now - (feed.polled ?? 0) < every) continue;
    feed.polled = now;
    feed.refresh();
  }
}

function onProgress({ detail }) {
  if (!RUN_ID.test(detail?.run ?? "")) return;
  feedOf(detail.run).take(detail);
  const node = nodeOf(detail.node);
  for (const entry of monitors.values()) if (entry.run === NEWEST && entry.monitor.feed?.id !== detail.run) entry.listed = 0;
  const entry = monitors.get(node);
  if (!entry) return;
  remember(node, detail.run);
  refreshEntry(node, entry);
}

// What Train LoRA says stands over its curve.
function onText({ detail }) {
  const node = nodeOf(detail?.node);
  if (node?.comfyClass === TRAINER) monitors.get(node)?.monitor.say(detail.text);
  texts.take(detail);
}

function onExecuted({ detail }) {
  voting.executed(detail);
  files.executed(detail);
  texts.executed(detail);
  const run = detail?.output?.g2rpo_run?.[0];
  const node = nodeOf(detail?.display_node ?? detail?.node);
  const entry = monitors.get(node);
  if (!RUN_ID.test(run ?? "") || !entry) return;
  Object.assign(entry, { told: run, stood: null });
  remember(node, run);
  refreshEntry(node, entry);
  const read = feedOf(run).refresh();
  // What Training Result says of its run holds until that goes on, which nobody tells the block.
  if (node.comfyClass === RESULT) read.then(() => (entry.stood = standing(feedOf(run))));
}

function onEnd() {
  for (const feed of feeds.values()) feed.stop();
}

app.registerExtension({
  name: "g2rpo.curve",
  setup() {
    for (const { href } of STYLES) document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    api.addEventListener("g2rpo.progress", onProgress);
    api.addEventListener("g2rpo.text", onText);
    api.addEventListener("executed", onExecuted);
    for (const end of ["execution_error", "execution_interrupted", "execution_success"]) api.addEventListener(end, onEnd);
    setInterval(look, LOOK_EVERY);
  },
  nodeCreated(node) {
    if (node.comfyClass === TRAINER || node.comfyClass in WIRED) addMonitor(node);
    if (node.comfyClass === VOTER) voting.add(node);
    if (WRITERS.includes(node.comfyClass)) files.add(node);
    texts.add(node);
    if (node.comfyClass === MIXER) grows(node);
    colourNode(node);
    if (node.comfyClass?.startsWith("G2RPO_")) nameBoxes(node, window);
  },
  loadedGraphNode(node) {
    const entry = monitors.get(node);
    if (entry) refreshEntry(node, entry);
    // A folded part of a graph shows boxes of the nodes inside, which it has only once it is loaded.
    if (node.subgraph?.nodes.some((inner) => inner.type?.startsWith("G2RPO_"))) nameBoxes(node, window);
    greyTyped(node);
    voting.restore(node);
    files.restore(node);
    texts.restore(node);
  },
});
