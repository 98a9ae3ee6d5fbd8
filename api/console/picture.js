// The gateway as a picture, and the rates of the last minutes as two curves. SVG, made anew from values each time.

import { bits, count, several } from "./words.js";

export const svg = (name, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

const lines = (x, y, said) => said.map(([kind, text], row) => svg("text", { x, y: y + row * 20, class: kind }, text));

function box(x, width, name, said) {
  return [
    svg("rect", { x, y: 10, width, height: 200, rx: 8, class: "box" }),
    svg("text", { x: x + 14, y: 36, class: "name" }, name),
    ...lines(x + 14, 60, said),
  ];
}

// One arrow for one direction: the busier, the thicker; it moves while something flows.
function arrow(from, to, y, kind, rate, flows) {
  const width = rate > 0 ? 2 + Math.min(6, Math.log10(1 + rate / 1000) * 1.6) : 1.5;
  const ahead = Math.sign(to - from);
  const middle = (from + to) / 2;
  return [
    svg("path", { d: `M${from} ${y}H${to - ahead * 12}`, class: `flow ${kind}${rate > 0 ? " moving" : ""}`, "stroke-width": width }),
    svg("path", { d: `M${to} ${y}l${-ahead * 13} -7v14z`, class: `head ${kind}` }),
    svg("text", { x: middle, y: y - 14, class: kind, "text-anchor": "middle" }, `${kind} ${bits(rate)}`),
    svg("text", { x: middle, y: y + 24, class: "quiet", "text-anchor": "middle" }, `${count(flows)} connections/s`),
  ];
}

function side(status, name) {
  const link = status.links[name];
  if (!link) return [["bad", "no such interface"]];
  return [[link.up ? "quiet" : "bad", link.up ? `up, MTU ${link.mtu}` : "down"], ["quiet", link.mac]];
}

export function picture(status, spec, traffic) {
  const { in: coming, out: going } = traffic.total;
  const { vpc, external } = status.interfaces;
  const counts = status.counts;
  const rules = [
    ["", several(counts.fips, "floating IP")],
    ["", several(counts.dnats + counts.sharedDnats, "port mapping")],
    ["", several(counts.snats, "source translation")],
    ["", several(counts.qos, "bandwidth limit")],
    ["quiet", `iptables-${status.variant}`],
    ["quiet", `${count(traffic.conntrack.count ?? 0)} of ${count(traffic.conntrack.max ?? 0)} connections`],
  ];
  const tenant = [...side(status, vpc), ...(spec?.routes ?? []).slice(0, 5).map((route) => ["", `${route.cidr} via ${route.nextHopIp}`])];
  const outside = [
    ...side(status, external),
    [status.arp.on ? "quiet" : "bad", status.arp.on ? "answers ARP" : "answers no ARP (no EIP)"],
    ["", several(counts.eips, "EIP")],
    ...(spec?.gatewayV4 ? [["", `gateway ${spec.gatewayV4}`]] : []),
    ...(status.conflicts.length ? [["bad", `${status.conflicts.length} held by others too`]] : []),
  ];
  const told = `Tenant side ${vpc}, external side ${external}. Out ${bits(going.bytesPerSecond)}, in ${bits(coming.bytesPerSecond)}.`;
  return svg(
    "svg", { viewBox: "0 0 1000 220", role: "img", "aria-label": told },
    ...box(5, 210, `Tenant side: ${vpc}`, tenant),
    ...box(395, 210, "Translation", rules),
    ...box(785, 210, `External side: ${external}`, outside),
    ...arrow(220, 390, 75, "out", going.bytesPerSecond, going.newFlowsPerSecond),
    ...arrow(390, 220, 155, "in", coming.bytesPerSecond, coming.newFlowsPerSecond),
    ...arrow(610, 780, 75, "out", going.bytesPerSecond, going.newFlowsPerSecond),
    ...arrow(780, 610, 155, "in", coming.bytesPerSecond, coming.newFlowsPerSecond),
  );
}

// `samples`: [{in, out}] in bytes a second, oldest first; `places`: how many fit.
export function curves(samples, places) {
  const top = Math.max(1, ...samples.flatMap((sample) => [sample.in, sample.out]));
  const path = (kind) => samples.map((sample, index) => {
    const x = ((places - samples.length + index) / (places - 1)) * 1000;
    return `${index ? "L" : "M"}${x.toFixed(1)} ${(58 - (sample[kind] / top) * 54).toFixed(1)}`;
  }).join("");
  return {
    top,
    element: svg(
      "svg", { viewBox: "0 0 1000 60", preserveAspectRatio: "none", height: 60, "aria-hidden": "true" },
      svg("path", { d: "M0 58H1000", class: "axis" }),
      svg("path", { d: path("out"), class: "curve out" }),
      svg("path", { d: path("in"), class: "curve in" }),
    ),
  };
}
