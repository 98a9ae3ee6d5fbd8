// Speaks to the gateway's HTTP face: JSON documents, and the stream of events. Only ever reads.

const TOKEN = "natgw-token";

export class Unauthorized extends Error {}

export class Refusal extends Error {} // the message is what the gateway said

export function remember(token) {
  sessionStorage.setItem(TOKEN, token);
}

// `natgw console` puts its token behind the #, which browsers send to nobody; it does not stay in the address.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  remember(given);
  history.replaceState(null, "", location.pathname);
}

async function ask(path, headers = {}, signal = undefined) {
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers = { ...headers, Authorization: `Bearer ${token}` };
  const response = await fetch(path, { headers, signal, cache: "no-store" });
  if (response.status === 401) throw new Unauthorized();
  if (!response.ok) throw new Refusal(await said(response));
  return response;
}

async function said(response) {
  const problem = await response.json().catch(() => ({}));
  const fields = (problem.errors ?? []).map((error) => `${error.location ?? error.field ?? ""} ${error.detail ?? error.message ?? ""}`);
  return [problem.detail ?? problem.title ?? `HTTP ${response.status}`, ...fields].join("; ");
}

export async function get(path) {
  return (await ask(path)).json();
}

// Calls `heard(event)` for each event, from the newest `backlog` ones on, as long as the page lives. EventSource cannot send a
// token, so the stream is read here; a broken one is resumed after its last event. `up(bool)` tells whether it stands.
export async function follow(backlog, heard, up) {
  let last = null;
  const take = (event) => {
    last = event.id;
    heard(event);
  };
  for (;;) {
    try {
      if (last === null) {
        for (const event of await get(`/v1/events?follow=false&limit=${backlog}`)) take(event);
      }
      const headers = last === null ? {} : { "Last-Event-ID": String(last) };
      const response = await ask("/v1/events", headers);
      up(true);
      for await (const event of parsed(response.body)) take(event);
    } catch (error) {
      if (error instanceof Unauthorized) return up(false);
    }
    up(false);
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// Server-sent events: blocks of "field: value" lines. What has no number (a gap, a heartbeat) is no event of the gateway.
async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = new Map(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      if (fields.has("id")) yield JSON.parse(fields.get("data"));
    }
  }
}
