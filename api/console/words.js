// Numbers and objects in words; nothing here touches the page.

const UNITS = ["", "k", "M", "G", "T"];

function scaled(value, step) {
  let unit = 0;
  while (value >= step * 0.9995 && unit < UNITS.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${unit && value < 99.95 ? value.toFixed(1) : Math.round(value)} ${UNITS[unit]}`;
}

export const bits = (bytesPerSecond) => `${scaled(bytesPerSecond * 8, 1000)}bit/s`;
export const count = (value) => scaled(value, 1000).trim();
export const several = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

export function duration(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const index = Math.max(0, parts.findIndex(([size]) => seconds >= size));
  return parts.slice(seconds < 1 ? 3 : index, index + 2).map(([size, name], place) => {
    const whole = Math.floor((place ? seconds % parts[index][0] : seconds) / size);
    return `${whole} ${name}`;
  }).join(" ");
}

// What hangs on each EIP, as lines: [what, to whom].
export function holdings(spec) {
  const held = new Map(spec.eips.map((eip) => [eip.address.split("/")[0], []]));
  const add = (eip, what, whom) => held.get(eip)?.push([what, whom]);
  for (const fip of spec.fips) add(fip.eip, "floating IP", fip.internalIp);
  for (const dnat of spec.dnats) add(dnat.eip, `${dnat.externalPort}/${dnat.protocol}`, `${dnat.internalIp}:${dnat.internalPort}`);
  for (const dnat of spec.sharedDnats) {
    const backends = dnat.backends.map((backend) => `${backend.internalIp}:${backend.internalPort}`);
    add(dnat.eip, `${dnat.externalPort}/${dnat.protocol}`, backends.join(" | "));
  }
  for (const snat of spec.snats) add(snat.eip, "SNAT", snat.internalCIDR);
  return held;
}
