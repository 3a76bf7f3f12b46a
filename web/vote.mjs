// The block Vote in the page: shows the group that was drawn, and writes what is clicked into the block's widget "votes".

import { Ballot, sameGroup } from "./ballot.mjs";

export const VOTER = "G2RPO_VoteRollout";
const KEY = /^[0-9a-f]{16}$/;

export class Voting {
  // `nodeOf(id)` finds a node, `left` takes what removed nodes leave in the page, `scroll` is what the wheel does.
  constructor({ app, api, nodeOf, left, adopt, scroll }) {
    Object.assign(this, { app, api, nodeOf, left, adopt, scroll, ballots: new Map(), groups: new Map() });
  }

  add(node) {
    const resized = () => {
      const least = node.computeSize();
      if (node.size[1] < least[1]) node.setSize([node.size[0], least[1]]);
      node.setDirtyCanvas?.(true, true);
    };
    const ballot = new Ballot({ changed: (votes) => this.write(node, votes), done: () => this.goOn(), doneLabel: "Vote and go on", resized, room: (grid) => grid.clientHeight });
    const widget = node.addDOMWidget("g2rpo_ballot", "g2rpo_ballot", ballot.root, { serialize: false, hideOnZoom: false, getMinHeight: () => ballot.height });
    // `options.serialize` keeps it out of the prompt, this out of the workflow.
    widget.serialize = false;
    ballot.root.addEventListener("wheel", this.scroll, { passive: false });
    hide(votesOf(node));
    node.setSize([Math.max(node.size[0], 460), Math.max(node.size[1], node.computeSize()[1])]);
    this.ballots.set(node, ballot);
    setTimeout(() => this.adopt(node, ballot.root), 100);
    const before = node.onRemoved;
    const voting = this;
    node.onRemoved = function onRemoved(...given) {
      voting.ballots.delete(node);
      ballot.dispose();
      voting.left.set(String(node.id), ballot.root);
      return before?.apply(this, given);
    };
  }

  look() {
    for (const [node, ballot] of this.ballots) this.adopt(node, ballot.root);
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

  place(node) {
    return `${this.app.graph?.id ?? ""}:${node.id}`;
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
  // The newer renderer keeps this very object.
  (widget.options ??= {}).hidden = true;
}
