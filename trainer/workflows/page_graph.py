"""A workflow as ComfyUI's page saves it: wires are followed through what the page itself resolves.

That is reroutes, Get and Set nodes, primitives, bypassed and muted nodes, and graphs folded into nodes. Loops
count their steps, because a file may be as deep and as circular as it likes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from .graph_file import (
    INPUTS,
    SETTERS,
    Definition,
    Link,
    Raw,
    WorkflowError,
    definition,
    listed,
    name_of,
    number_of,
    shown,
)
from .node_table import KINDS, widget_values

MUTED, BYPASSED = 2, 4
REROUTES = ("Reroute", "Reroute (rgthree)", "ReroutePrimitive|pysssss")
MAX_HOPS = 50_000
"""Sockets that are looked at on the way from node to node, for a whole workflow."""
MAX_DEPTH = 100
"""Of graphs that are folded into each other."""
MAX_BLOCKS = 20


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph at its place: folded graphs may stand at several."""

    graph: Definition
    host: Raw | None = None
    outer: Scope | None = None
    prefix: str = ""
    depth: int = 0


@dataclass(frozen=True)
class Node:
    """A node that runs, as people find it again."""

    kind: str
    title: str
    id: str
    raw: Raw = field(compare=False, repr=False)
    scope: Scope | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """Name the node in an error."""
        return f"node {shown(self.title or self.kind)} ({shown(self.kind)[1:-1]}, id {self.id[:40]})"


@dataclass(frozen=True)
class Output:
    """An output of a node, from which a wire comes."""

    node: Node
    slot: int


@dataclass(frozen=True)
class Nothing:
    """What an input gets where nothing comes; `off` says which node would give it, and that it is off."""

    off: str = ""


class PageGraph:
    """A workflow of the page."""

    def __init__(self, tree: Raw) -> None:
        self.top = definition({**tree, "inputs": []}, "the workflow")
        self.hops = 0
        self.folded: dict[str, Raw] = {}
        extra = tree.get("extra")
        groups = extra.get("groupNodes") if isinstance(extra, dict) else None
        self.groups: Raw = groups if isinstance(groups, dict) else {}
        """What old pages grouped into nodes, by name."""
        self.read: dict[str, Definition] = {}
        self.outside: dict[int, Mapping[str, Mapping[str, Any]]] = {}
        """What is typed on folded nodes, by the identities of these: files may have long lists of it."""
        folded = tree.get("definitions")
        for each in listed(folded, "subgraphs", "definitions") if isinstance(folded, dict) else ():
            key = number_of(each.get("id"), "the id of a subgraph")
            if key in self.folded:
                raise WorkflowError(f"the workflow has two subgraphs of the id {key[:60]}; save it anew")
            self.folded[key] = each

    def hop(self, count: int = 1) -> None:
        """Count steps, and end what goes in a circle."""
        self.hops += count
        if self.hops > MAX_HOPS:
            raise WorkflowError(
                f"its wires go in a circle, or by more than {MAX_HOPS} sockets and widgets; remove the circle"
            )

    def entries(self, raw: Raw) -> list[Raw]:
        """List a node's inputs; older files have none where nothing can be connected."""
        found = listed(raw, "inputs", f"node {raw['id']}") if raw.get("inputs") else []
        self.hop(len(found))
        return found

    def graph_of(self, key: str) -> Definition:
        """Return a folded graph."""
        if key not in self.read:
            self.read[key] = definition(self.folded[key], f"subgraph {shown(self.folded[key].get('name'))}")
        return self.read[key]

    def within(self, scope: Scope, host: Raw) -> Scope:
        """Return what is folded into a node."""
        graph, around = self.graph_of(host["type"]), scope
        while around.outer is not None:
            if around.graph is graph:
                raise WorkflowError(f"{graph.name} contains itself; unpack one of them")
            around = around.outer
        if scope.depth >= MAX_DEPTH:
            raise WorkflowError(f"its subgraphs are folded more than {MAX_DEPTH} deep; unpack some")
        return Scope(graph, host, scope, f"{scope.prefix}{host['id']}:", scope.depth + 1)

    def nodes(self, kind: str) -> tuple[list[Node], list[Node]]:
        """Return the nodes of a kind that run, and those that are muted or bypassed; a few of each."""
        holders = self._holders(kind)
        found: tuple[list[Node], list[Node]] = ([], [])
        waiting = [Scope(self.top)]
        while waiting and max(map(len, found)) < MAX_BLOCKS:
            scope = waiting.pop()
            self.hop()
            hosts = []
            for raw in scope.graph.nodes.values():
                own = raw.get("type")
                if own == kind:
                    found[_is_off(raw)].append(_node(raw, scope))
                elif isinstance(own, str) and own in holders and not _is_off(raw):
                    hosts.append(raw)
            # The deepest first: every one of them holds a block, so that a few are found soon.
            waiting += [self.within(scope, raw) for raw in reversed(hosts[:MAX_BLOCKS])]
        return found

    def hidden(self, kind: str) -> str:
        """Say where a node of a kind is that nodes() does not find: in what is off, or in an old group."""
        holders, waiting = self._holders(kind, running=False), [Scope(self.top)]
        while waiting:
            scope = waiting.pop()
            self.hop(1 + len(scope.graph.nodes) // 20)  # a look costs less than a step from node to node
            for raw in scope.graph.nodes.values():
                own, node = raw.get("type"), _node(raw, scope)
                if isinstance(own, str) and own in holders:
                    if _is_off(raw):
                        off = "muted" if raw.get("mode") == MUTED else "bypassed"
                        return f"{kind} is in {node.label}, which is {off}; switch it on"
                    waiting.append(self.within(scope, raw))
                if self._groups(node.kind, kind):
                    return f"{kind} is in {node.label}, a group of an old kind; ungroup it"
        return ""

    def _groups(self, group: str, kind: str) -> bool:
        """Return whether a node is a group of the old kind with a node of a kind in it."""
        prefix, _, name = group.partition(">")
        found = self.groups.get(name) if prefix == "workflow" else None
        within = found.get("nodes") if isinstance(found, dict) else None
        return isinstance(within, list) and any(
            isinstance(each, dict) and each.get("type") == kind for each in within
        )

    def _holders(self, kind: str, running: bool = True) -> set[str]:
        """Return the folded graphs that hold a node of a kind, at any depth, in nodes that run or in any."""
        above: dict[str, set[str]] = {}
        for key, raw in self.folded.items():
            for node in listed(raw, "nodes", "a subgraph"):
                if isinstance(node.get("type"), str) and (
                    node["type"] == kind or not (running and _is_off(node))
                ):
                    above.setdefault(node["type"], set()).add(key)
        holders, waiting = set(), [kind]
        while waiting:
            new = above.get(waiting.pop(), set()) - holders
            holders |= new
            waiting += new
        return holders

    def every_kind(self) -> Iterator[Node]:
        """Yield the outermost nodes, to name what a workflow is made of."""
        scope = Scope(self.top)
        for raw in self.top.nodes.values():
            yield _node(raw, scope)

    def given(self, node: Node, name: str) -> Output | Nothing | Any:
        """Return what an input of a node that is known gets: an output, a value, or nothing."""
        raw, scope = node.raw, node.scope
        assert scope is not None
        found: Any = Nothing()
        for entry in self.entries(raw):
            if entry.get("name") == name and entry.get("link") is not None:
                found = self._follow(scope, entry["link"], entry.get("type"))
        widgets = KINDS[node.kind].widgets
        if not isinstance(found, Nothing) or name not in widgets:
            return found
        typed = self._typed(scope, str(raw["id"]), name)
        return typed if typed is not None else widget_values(raw, node.label).get(name, widgets[name].default)

    def _follow(self, scope: Scope, number: Any, kind: Any) -> Output | Nothing | Any:
        """Follow a wire back to where its value is made."""
        while number is not None:
            self.hop()
            link = scope.graph.links.get(number_of(number, "the number of a wire"))
            if link is None:
                raise WorkflowError(f"{scope.graph.name} lacks wire {shown(number)}; draw it anew")
            if link.origin == INPUTS and scope.outer is not None and scope.host is not None:
                entry, value = self._port(scope, link)
                if value is not None:
                    return value
                scope, number = scope.outer, entry.get("link")
                continue
            raw = scope.graph.nodes.get(link.origin)
            if raw is None:
                raise WorkflowError(f"wire {shown(number)} begins at node {link.origin}, which is not there")
            node = _node(raw, scope)
            if node.kind == "PrimitiveNode":  # The page writes its value into the widget, whatever its mode.
                return self._primitive(scope, raw)
            if raw.get("mode") == MUTED:
                return Nothing(f"{node.label} is muted")
            if raw.get("mode") == BYPASSED:
                entry = self._passed(raw, link.slot, kind)
                if entry is None:
                    return Nothing(f"{node.label} is bypassed")
                number = entry.get("link")
            elif node.kind in SETTERS:
                scope, number = self._setter(node)
            elif node.kind in REROUTES or node.kind in SETTERS.values():
                number = self._first(raw)
            elif node.kind in self.folded:
                scope = self.within(scope, raw)
                number = scope.graph.ends.get(link.slot)
            else:
                return Output(node, link.slot)
        return Nothing()

    def _first(self, raw: Raw) -> Any:
        """Return the wire into a node's first input."""
        return next((entry.get("link") for entry in self.entries(raw)), None)

    def _passed(self, raw: Raw, slot: int, kind: Any) -> Raw | None:
        """Return the input that a bypassed node hands on: of the same place if it fits, else the first of
        just that type, else the first that takes any.
        """
        entries = self.entries(raw)
        own = entries[slot : slot + 1] if slot >= 0 else []
        for some, kinds in ((own, (kind, "*")), (entries, (kind,)), (entries, ("*",))):
            for entry in some:
                if entry.get("type") in kinds:
                    return entry
        return None

    def _port(self, scope: Scope, link: Link) -> tuple[Raw, Any]:
        """Return the socket of a folded node that a wire within it comes from, and the value typed there."""
        host, names = scope.host or {}, scope.graph.inputs
        name = names[link.slot] if 0 <= link.slot < len(names) else None
        entry = next((each for each in self.entries(host) if each.get("name") == name), {})
        if entry.get("link") is not None:
            return entry, None
        return entry, self._typed_outside(scope, "-1").get(name_of(name))

    def _primitive(self, scope: Scope, raw: Raw) -> Any:
        """Return the value of one of the page's own primitives; its widget is called as what it leads to."""
        number, values = str(raw["id"]), raw.get("widgets_values")
        typed = self._typed(scope, number, next(iter(self._typed_outside(scope, number)), "value"))
        if typed is not None:
            return typed
        return values[0] if isinstance(values, list) and values else Nothing()

    def _typed(self, scope: Scope | None, number: str, name: str) -> Any:
        """Return what is typed for a node's widget on the outermost of the folded nodes that show it."""
        found, full = None, name
        while scope is not None and scope.host is not None:
            self.hop()
            outside = self._typed_outside(scope, number)
            shows = next((each for each in (name, full) if each in outside), None)
            if shows is None:
                break
            found = found if outside[shows] is None else outside[shows]
            # Folded once more, it is called as within, or so that its node is named, too.
            full, number, scope = f"{number}: {full}", str(scope.host["id"]), scope.outer
        return found

    def _typed_outside(self, scope: Scope, number: str) -> Mapping[str, Any]:
        """Return what is typed on the folded node around a node, or around its sockets (-1), by name."""
        if scope.host is None:
            return {}
        if id(scope.host) not in self.outside:
            self.outside[id(scope.host)] = self._all_typed_outside(scope.host, scope.graph)
        return self.outside[id(scope.host)].get(number, {})

    def _all_typed_outside(self, host: Raw, graph: Definition) -> Mapping[str, Mapping[str, Any]]:
        """Return the values that a folded node's own widgets have, by the node within and the name; None
        where none is saved.

        They follow the sockets of the graph, where no list says another: exported files lack some of the
        node's own inputs.
        """
        values, properties = host.get("widgets_values"), host.get("properties")
        values = values if isinstance(values, list) else []
        self.hop(len(values))
        listing = properties.get("proxyWidgets") if isinstance(properties, dict) else None
        if isinstance(listing, str):
            self.hop(listing.count("[") + listing.count("{"))
            try:
                listing = json.loads(listing)
            except (ValueError, RecursionError):
                listing = None
        if not isinstance(listing, list) or not listing:
            listing = [["-1", name] for name in graph.promoted[: len(values)]]
        found: dict[str, dict[str, Any]] = {}
        self.hop(len(listing))
        for key, value in zip_longest(listing, values[: len(listing)]):
            if isinstance(key, list) and len(key) > 1:
                found.setdefault(name_of(key[0]), {})[name_of(key[1])] = value
        return found

    def _setter(self, node: Node) -> tuple[Scope, Any]:
        """Return the wire that goes into the Set node of a Get node, and where that is."""
        values = node.raw.get("widgets_values")
        name = name_of(values[0]) if isinstance(values, list) and values else ""
        scope = node.scope
        while scope is not None:
            found = scope.graph.setters.get((SETTERS[node.kind], name), [])
            if len(found) > 1:
                raise WorkflowError(f"two Set nodes are called {shown(name)}; rename one of them")
            if found:
                setter = _node(found[0], scope)
                if found[0].get("mode") == MUTED:
                    raise WorkflowError(f"{setter.label} is muted, and {node.label} needs it; unmute it")
                return scope, self._first(found[0])
            scope = scope.outer
        raise WorkflowError(f"{node.label} gets {shown(name)}, which no Set node is called; add it")


def _is_off(raw: Raw) -> bool:
    return raw.get("mode") in (MUTED, BYPASSED)


def _node(raw: Raw, scope: Scope) -> Node:
    title, kind = raw.get("title"), raw.get("type")
    return Node(
        kind if isinstance(kind, str) else "",
        title if isinstance(title, str) else "",
        f"{scope.prefix}{raw['id']}",
        raw,
        scope,
    )
