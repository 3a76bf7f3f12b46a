// The block Vote in the page: shows the group that was drawn, and writes what is clicked into the block's widget "votes".

import { Ballot, BALLOT_HEIGHT, KEYS, sameGroup } from "./ballot.mjs";

export const VOTER = "G2RPO_VoteRollout";
const KEY = /^[0-9a-f]{16}$/;

export class Voting {
  // `nodeOf(id)` finds a node, `place(node)` names it within its workflow.
  constructor({ app, api, nodeOf, widgets, place }) {
    Object.assign(this, { app, api, nodeOf, widgets, place, ballots: new Map(), groups: new Map() });
  }

  add(node) {
    const ballot = new Ballot({ changed: (votes) => this.write(node, votes), done: () => this.goOn(), doneLabel: "Vote and go on", room: (grid) => grid.clientHeight, hint: KEYS });
    hide(votesOf(node));
    this.ballots.set(node, ballot);
    const removed = () => {
      this.ballots.delete(node);
      ballot.dispose();
    };
    this.widgets.attach(node, "g2rpo_ballot", ballot.root, { height: BALLOT_HEIGHT, width: 460, removed });
  }

  // A group has been drawn. Its votes are the widget's, or those that the run has kept; votes on another group are forgotten.
  executed(detail) {
    const group = detail?.output?.g2rpo_ballot?.[0];
    const node = this.nodeOf(detail?.display_node ?? detail?.node);
    const ballot = this.ballots.get(node);
    if (!ballot || !Array.isArray(group?.pictures)) return;
    const pictures = group.pictures.filter((picture) => KEY.test(picture?.key)).map((picture) => ({ key: picture.key, src: this.address(picture) }));
    const keys = pictures.map((picture) => picture.key);
    const own = read(votesOf(node)?.value);
    const votes = sameGroup(keys, own) ? own : group.votes;
    if (!sameGroup(keys, own)) this.write(node, sameGroup(keys, votes) ? votes : null);
    if (sameGroup(ballot.opinion.keys, { pictures: keys }) && sameGroup(keys, ballot.opinion.votes())) return;
    const shown = { pictures, prompt: String(group.prompt ?? "") };
    this.groups.set(this.place(node), shown);
    ballot.show(shown, votes);
  }

  // Undo, and opening the workflow once more, make all nodes anew: the group that was shown is shown again, with the widget's votes.
  restore(node) {
    const group = this.groups.get(this.place(node));
    if (group) this.ballots.get(node)?.show(group, read(votesOf(node)?.value));
  }

  address({ filename, subfolder, type }) {
    return this.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type: type ?? "temp" })}`);
  }

  write(node, votes) {
    const widget = votesOf(node);
    const text = votes ? JSON.stringify(votes) : "";
    if (!widget || widget.value === text) return;
    widget.value = text;
    widget.callback?.(text, this.app.canvas, node);
    const tracker = this.app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
  }

  // Two runs of the graph: the first learns from these votes, the second draws the next group.
  goOn() {
    this.app.queuePrompt(0, 2);
  }
}

const votesOf = (node) => node?.widgets?.find((widget) => widget.name === "votes");

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

// The widget holds what the page writes; there is nothing to type. It stays part of the workflow and of the prompt.
function hide(widget) {
  if (!widget) return;
  widget.hidden = true;
  widget.computeSize = () => [0, -4];
  // The newer renderer keeps this very object.
  (widget.options ??= {}).hidden = true;
}
