// The page of a pearl server: what two devices do for a text, as it happens, or from a run that was saved.
//
// A `Store` is fed with events (pearl/server/seen.py says what they are) and knows texts and passes. Everything on the
// screen is drawn from a store: the live one, which the server's stream feeds, or one that a file feeds on a clock of
// its own. All words of models and users go through textContent.

const $ = (id) => document.getElementById(id);
const make = (tag, facts = {}, ...inside) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) name in made ? (made[name] = value) : made.setAttribute(name, value);
  made.append(...inside);
  return made;
};
const svg = (tag, facts = {}, ...inside) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
};
const clear = (element) => element.replaceChildren();
const seconds = (ms, digits = 2) => `${(ms / 1000).toFixed(digits)} s`;
const percent = (x) => `${(100 * x).toFixed(0)} %`;
const kept = { get: (name) => { try { return sessionStorage.getItem(name) || ""; } catch { return ""; } },
  put: (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* a page from a file keeps nothing */ } } };

const KEY = [...crypto.getRandomValues(new Uint8Array(8))].map((x) => x.toString(16).padStart(2, "0")).join("");
const MOST_EVENTS = 60000, MOST_SHOWN = 40; // events that are kept; nodes of a tree that are drawn
const KINDS = { draft: "drafted", prepared: "prepared correction", suffix: "suffix", recycled: "recycled", target: "the target’s own" };

const kindOf = (token) => token.from === "target" || token.rank === null ? "target"
  : token.from === "suffix" || token.from === "recycled" ? token.from : token.rank > 0 ? "prepared" : "draft";
const kindOfRow = (origin) => (origin === "suffix" || origin === "recycled" ? origin : "draft");

// What is known

class Store {
  constructor() {
    this.events = []; this.texts = new Map(); this.bySequence = new Map(); this.alone = new Set();
    this.passes = []; this.drafts = []; this.notes = []; this.dropped = 0; this.last = 0; this.version = 0;
  }

  text(label) {
    if (!this.texts.has(label)) this.texts.set(label, { label, tokens: [], passes: [], content: null, others: 0 });
    return this.texts.get(label);
  }

  feed(event) {
    this.version++;
    this.events.push(event);
    if (this.events.length > MOST_EVENTS) { this.events.splice(0, 1000); this.dropped += 1000; }
    const text = this.bySequence.get(event.seq);
    if (event.e === "began" && event.mode.startsWith("ar")) this.alone.add(event.seq); // no drafter hears of it
    if (event.e === "began" && event.label) {
      const begun = Object.assign(this.text(event.label), { mode: event.mode, began: event.t, prompt: event.prompt, cached: event.cached, seq: event.seq });
      this.bySequence.set(event.seq, begun);
      this.current = begun;
    } else if (event.e === "pass") {
      this.last = Math.max(this.last, event.t[4]);
      keep(this.passes, event);
      if (text && event.tokens) {
        text.passes.push(event);
        for (const token of event.tokens) text.tokens.push({ ...token, pass: event });
        if (event.finish) Object.assign(text, { ended: event.t[4], finish: event.finish });
      } else for (const other of this.texts.values()) if (other.began && !other.ended) other.others++;
    } else if (event.e === "draft") {
      this.last = Math.max(this.last, event.t);
      keep(this.drafts, event);
    } else if (event.e === "drafter") keep(this.notes, event);
    else if (event.e === "dropped") this.dropped += event.n;
  }
}

function keep(row, event) {
  row.push(event);
  if (row.length > 4000) row.splice(0, 1000);
}

const live = new Store();
let shown = live, state = null, asked = [], replay = null, offset = Infinity, chosen = null;
const now = () => (replay ? replay.at : offset === Infinity ? 0 : performance.now() - offset);

// The server

const headers = (more = {}) => ({ ...(kept.get("pearl-key") ? { Authorization: `Bearer ${kept.get("pearl-key")}` } : {}), ...more });

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

let listening = 0;

async function listen() {
  const mine = ++listening; // a later one takes over: two would tell everything twice
  for (let pause = 500; mine === listening; pause = Math.min(pause * 2, 5000)) {
    try {
      const found = await fetch("v1/pearl/state", { headers: headers() });
      if (found.status === 401) { $("keyform").hidden = false; say("an API key is needed", "bad"); return; }
      if (!found.ok) throw new Error((await problem(found)) || "no answer");
      const told = await found.json();
      if (!told.modes) { say(told.status, told.status === "loading" ? "loading" : "bad"); await new Promise((go) => setTimeout(go, pause)); continue; }
      $("keyform").hidden = true;
      know(told);
      const response = await fetch(`v1/pearl/events?key=${KEY}`, { headers: headers() });
      if (!response.ok) throw new Error(await problem(response));
      pause = 500;
      for await (const line of lines(response)) {
        const event = JSON.parse(line);
        const at = event.e === "pass" ? event.t[4] : event.t;
        if (at !== undefined) offset = Math.min(offset, performance.now() - at);
        live.feed(event);
        if (event.e === "drafter") status(event.kind);
      }
      say("the server has gone", "bad");
    } catch (error) {
      if (!replay) say(String(error.message).includes("fetch") ? "no connection" : error.message, "bad");
    }
    await new Promise((go) => setTimeout(go, pause));
  }
}

async function problem(response) {
  try { return (await response.json()).error.message; } catch { return `the server says ${response.status}`; }
}

function know(found) {
  state = found;
  offset = Math.min(offset, performance.now() - found.now);
  $("pair").textContent = found.draft ? `${found.target} · drafted for by ${found.draft}` : found.target;
  $("pair").title = (found.where || []).join("\n");
  say(found.status, found.status);
  $("kill").hidden = !found.may_kill || !!replay;
  for (const [id, wanted] of [["mode", found.mode], ["mode-a", "ar"], ["mode-b", found.modes.includes("tree") ? "tree" : found.mode]]) {
    if ($(id).options.length) continue;
    $(id).append(...found.modes.map((mode) => make("option", { value: mode, textContent: mode, selected: mode === wanted })));
  }
}

function say(words, is) {
  if (replay && is !== "replay") return;
  $("status").textContent = words;
  $("status").dataset.is = is;
}

const status = (kind) => say(kind === "back" || kind === "heard" ? "ready" : "degraded: the target writes alone", kind === "back" || kind === "heard" ? "ready" : "degraded");

// Asks for a text and follows it to its end. The words come by the answer's own stream, which misses nothing.
async function write(entry, body, signal) {
  const text = live.text(entry.label);
  text.content = "";
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, {
    method: "POST", signal, headers: headers({ "Content-Type": "application/json", "X-Pearl-Label": entry.label }),
    body: JSON.stringify({ ...body, stream: true }),
  });
  if (!response.ok) throw new Error(await problem(response));
  for await (const line of lines(response)) {
    if (line === "[DONE]") break;
    const said = JSON.parse(line);
    if (said.error) throw new Error(said.error.message);
    for (const choice of said.choices) {
      text.content += choice.delta ? choice.delta.content || "" : choice.text || "";
      if (choice.finish_reason) text.answered = choice.finish_reason;
    }
    live.version++;
  }
  return text;
}

const body = (messages, mode, most, temperature) => ({
  ...(state.chat ? { messages } : { prompt: messages.map((one) => one.content).join("") }),
  mode, max_tokens: most, temperature, ...(temperature ? { seed: Math.floor(Math.random() * 2 ** 31) } : {}),
});
const label = () => `${KEY}/${asked.length + 1}`;

// A text on the screen

class TextView {
  constructor(element) {
    this.element = element;
    this.element.classList.add("text");
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", "An answer; the arrow keys go from token to token");
    this.reset();
    element.addEventListener("pointerover", (event) => event.target.matches(".tok") && point(this, event.target));
    element.addEventListener("pointerleave", () => point(null));
    element.addEventListener("click", (event) => event.target.matches(".tok") && this.choose(event.target));
    element.addEventListener("blur", () => point(null));
    element.addEventListener("keydown", (event) => this.key(event));
  }

  reset() {
    clear(this.element);
    this.count = 0; this.end = 0; this.spans = [];
    this.tail = document.createTextNode("");
    this.element.append(this.tail);
  }

  // `until`: the moment up to which the text is shown.
  show(text, until = Infinity) {
    this.text = text;
    let upto = this.count;
    if (upto && text.tokens[upto - 1].pass.t[4] > until) this.reset(), (upto = 0);
    while (upto < text.tokens.length && text.tokens[upto].pass.t[4] <= until) upto++;
    const follow = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 60;
    for (; this.count < upto; this.count++) {
      const token = text.tokens[this.count];
      if (text.content && token.at > this.end) this.gap([...text.content].slice(this.end, token.at).join("")); // events were dropped
      this.end = token.at + [...token.text].length;
      if (!token.text) continue;
      const span = make("span", { className: "tok", textContent: token.text });
      span.dataset.kind = kindOf(token);
      span.dataset.pass = token.pass.n;
      if (span.dataset.kind !== "target") span.style.setProperty("--deep", `${Math.min(10 + 4 * token.depth, 38)}%`);
      span.token = token;
      this.spans.push(span);
      this.tail.before(span);
    }
    const rest = until === Infinity && text.content !== null ? [...text.content].slice(this.end).join("") : "";
    if (this.tail.data !== rest) this.tail.data = rest;
    if (follow) this.element.scrollTop = this.element.scrollHeight;
  }

  gap(words) { this.tail.before(make("span", { className: "unseen", textContent: words, title: "What happened here was not seen" })); }

  choose(span) {
    choose(this.text, this.text.passes.indexOf(span.token.pass));
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") point(null);
    if (event.key === "Enter" && this.at !== undefined) this.choose(this.spans[this.at]);
    if (!step || !this.spans.length) return;
    event.preventDefault();
    this.at = Math.max(0, Math.min(this.spans.length - 1, (this.at ?? -1) + step));
    this.spans[this.at].scrollIntoView({ block: "nearest" });
    point(this, this.spans[this.at]);
  }
}

function point(view, span) {
  for (const old of document.querySelectorAll(".tok.here, .tok.pass")) old.classList.remove("here", "pass");
  $("tip").hidden = !span;
  if (!span) return;
  const token = span.token, kind = span.dataset.kind;
  for (const other of view.spans) if (other.token.pass === token.pass) other.classList.add("pass");
  span.classList.add("here");
  const told = [`${KINDS[kind]}${kind !== "target" && token.from !== kind ? ` (by ${token.from})` : ""}`];
  told.push(`pass ${token.pass.n}, depth ${token.depth} of ${token.pass.tokens.length}, ${token.pass.rows} rows read`);
  if (token.q !== null) told.push(`the drafter’s probability ${percent(token.q)}, its guess no. ${token.rank + 1}`);
  if (token.p !== undefined) told.push(`the target’s probability ${percent(token.p)}`);
  if (kind !== "target" && token.row === null) told.push("it came too late to be read: the next pass begins with it");
  const others = token.row === null ? [] : token.pass.tree.filter((row, place) => row[1] === token.pass.tree[token.row][1] && place !== token.row);
  if (others.length) told.push(`other guesses there: ${others.slice(0, 5).map((row) => visible(row[0])).join(" ")}`);
  $("tip").textContent = told.join("\n");
  const box = span.getBoundingClientRect(), tip = $("tip");
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${box.bottom + tip.offsetHeight + 14 > innerHeight ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
}

const visible = (words) => words.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

// The talk

let messages = [], stopping = null, busy = false;
const views = new Map(); // of the texts in the talk: [view, line below it]

function turn(entry) {
  if (!views.size) clear($("talk"));
  const told = make("p", { className: "told" }), holder = make("div");
  holder.dataset.label = entry.label;
  $("talk").append(make("p", { className: "asked", textContent: entry.prompt }), holder, told);
  views.set(entry.label, [new TextView(holder), told]);
  $("talk").scrollTop = $("talk").scrollHeight;
}

async function ask(event) {
  event?.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt || busy || !state || replay) return;
  const entry = { label: label(), view: "chat", prompt, mode: $("mode").value };
  asked.push(entry);
  turn(entry);
  $("prompt").value = "";
  const told = views.get(entry.label)[1];
  messages.push({ role: "user", content: prompt });
  await working(async (signal) => {
    try {
      await write(entry, body(messages, entry.mode, $("tokens").valueAsNumber || 256, $("temperature").valueAsNumber || 0), signal);
    } catch (error) {
      if (error.name !== "AbortError") { told.textContent = error.message; told.classList.add("bad"); }
    }
    const text = live.text(entry.label);
    text.over = true;
    if (text.content) messages.push({ role: "assistant", content: text.content });
    else messages.pop();
  });
}

async function working(work) {
  busy = true;
  stopping = new AbortController();
  $("send").disabled = $("go").disabled = true;
  $("stop").disabled = false;
  try { await work(stopping.signal); } finally {
    busy = false;
    $("send").disabled = $("go").disabled = false;
    $("stop").disabled = true;
    live.version++;
  }
}

function drawTalk(until) {
  for (const [name, [view, told]] of views) {
    const text = shown.text(name);
    if (replay) view.element.hidden = view.element.previousSibling.hidden = told.hidden = !text.began;
    const follow = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
    view.show(text, until);
    if (!told.classList.contains("bad")) told.textContent = summary(text);
    if (follow && !text.settled) $("talk").scrollTop = $("talk").scrollHeight;
    if (text.ended || text.over) text.settled = true;
  }
}

function summary(text) {
  if (!text.passes.length) return text.began ? "reading the prompt" : text.over ? "" : "waiting for a place";
  const drafted = text.tokens.filter((token) => kindOf(token) !== "target").length;
  const count = text.tokens.length, { rate } = speed(text);
  return `${text.mode} · ${count} tokens in ${text.passes.length} passes · ${drafted} had been guessed${rate ? ` · ${rate.toFixed(1)} tokens/s` : ""}` +
    `${text.finish === "length" ? " · ended at the limit" : !text.ended && text.over ? " · stopped" : ""}`;
}

// From the first token to the last: the reading of the prompt is no part of it.
function speed(text) {
  const first = text.passes[0], last = text.passes.at(-1);
  if (!first || first === last) return { ms: 0, rate: 0 };
  const ms = last.t[4] - first.t[4];
  return { ms, rate: ((text.tokens.length - first.tokens.length) / ms) * 1000 };
}

// The race

const race = { a: null, b: null, since: null, views: {} };
for (const side of ["a", "b"]) race.views[side] = new TextView($(`lane-${side}`).querySelector(".text"));

async function start(event) {
  event?.preventDefault();
  const prompt = $("raceprompt").value.trim();
  if (!prompt || busy || !state || replay) return;
  const sides = ["a", "b"].map((side) => ({ view: "race", side, prompt, mode: $(`mode-${side}`).value }));
  Object.assign(race, { a: null, b: null, since: null, over: false });
  for (const side of ["a", "b"]) race.views[side].reset();
  await working(async (signal) => {
    try {
      for (const entry of sides) {
        entry.label = label();
        asked.push(entry);
        race[entry.side] = live.text(entry.label);
        await write(entry, body([{ role: "user", content: prompt }], entry.mode, $("racetokens").valueAsNumber || 160, 0), signal);
        for (let wait = 0; wait < 40 && !race[entry.side].ended; wait++) await new Promise((go) => setTimeout(go, 25));
      }
      race.over = true;
    } catch (error) {
      $("verdict").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    }
  });
}

// How far the race's clock is, in ms after each one's first token. While the second runs, the first runs again from
// its record beside it: one engine has one target, so they can't run at once without slowing each other down.
function raceClock() {
  const started = race.b?.passes[0];
  if (race.since !== null) return (performance.now() - race.since) * 1;
  if (replay) return started ? now() - started.t[4] : race.a?.passes[0] ? now() - race.a.passes[0].t[4] : 0;
  if (started && !(race.over && race.a?.ended)) return now() - started.t[4];
  return Infinity;
}

function drawRace() {
  let clock = raceClock();
  const longest = Math.max(...["a", "b"].map((side) => (race[side] ? speed(race[side]).ms : 0)));
  if (race.since !== null && clock > longest + 300) race.since = null, (clock = Infinity);
  const most = Math.max(1, ...["a", "b"].map((side) => race[side]?.tokens.length || 0));
  for (const side of ["a", "b"]) {
    const lane = $(`lane-${side}`), text = race[side], first = text?.passes[0];
    const title = lane.querySelector("h2"), watch = lane.querySelector(".clock"), flag = lane.querySelector(".flag");
    title.textContent = text?.mode || $(`mode-${side}`).value || "";
    if (!first) { flag.hidden = true; watch.textContent = text?.began ? "reading the prompt" : ""; lane.querySelector("i").style.width = "0"; race.views[side].reset(); continue; }
    const ms = speed(text).ms, here = Math.min(clock, ms), again = race.since !== null || (side === "a" && race.b?.passes.length && !race.over && !replay);
    race.views[side].show(text, clock === Infinity ? Infinity : first.t[4] + clock + 0.01);
    const count = clock === Infinity ? text.tokens.length : race.views[side].count;
    const done = text.ended && clock >= ms;
    watch.textContent = `${seconds(clock === Infinity ? ms : here)} · ${count} tokens · ${text.passes.length > 1 ? (text.tokens.length / text.passes.length).toFixed(2) : "–"} a pass${again ? " · from its record" : ""}`;
    lane.querySelector("i").style.width = `${(100 * count) / most}%`;
    flag.hidden = !done;
    flag.textContent = done ? seconds(ms) : "";
  }
  verdict();
  $("again").disabled = busy || !race.over || !!replay;
}

function verdict() {
  const { a, b } = race;
  if (!a?.ended || !b?.ended) {
    if (busy && a) $("verdict").textContent = b ? "Now the second, and the first once more beside it from its record." : "First the one, then the other: they share one target.";
    return;
  }
  const [one, other] = [speed(a).ms, speed(b).ms];
  const parted = a.tokens.findIndex((token, place) => token.id !== b.tokens[place]?.id);
  const same = parted < 0 && a.tokens.length === b.tokens.length;
  const why = [a.mode, b.mode].includes("ar-all") ? ", as ar-all adds up on other cores or devices, in another order." : "!";
  const missed = shown.dropped ? ` ${shown.dropped} events were not seen.` : "";
  const others = a.others + b.others ? " Other texts were written meanwhile, so this is no fair race." : "";
  const key = [one, other, same, missed, others].join();
  if ($("verdict").dataset.key === key && $("verdict").querySelector("b")) return;
  $("verdict").dataset.key = key;
  clear($("verdict"));
  $("verdict").append(make("b", { textContent: `${(one / other).toFixed(2)}×` }),
    ` ${a.mode} ${seconds(one)}, ${b.mode} ${seconds(other)} from the first token to the last, as measured here. `,
    make("span", { id: "same", textContent: same ? `The same text, ${a.tokens.length} tokens.` : `The texts differ from token ${(parted < 0 ? a.tokens.length : parted) + 1} on${why}` }), missed + others);
}

// The lanes

const canvas = $("lanes"), pen = canvas.getContext("2d");
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
let inks = {};

function drawLanes(until) {
  const wide = canvas.clientWidth, high = canvas.clientHeight, ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(wide * ratio)) { canvas.width = Math.round(wide * ratio); canvas.height = Math.round(high * ratio); }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, wide, high);
  const left = 62, span = Number($("window").value), begin = until - span, x = (t) => left + ((t - begin) / span) * (wide - left - 6);
  const top = 24, bar = 40, gap = 34, below = top + bar + gap;
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = inks.faint;
  pen.textAlign = "left";
  pen.fillText("target", 4, top + bar / 2 + 4);
  pen.fillText("drafter", 4, below + bar / 2 + 4);
  const step = span <= 1000 ? 100 : span <= 2500 ? 250 : 500;
  pen.strokeStyle = inks.line;
  pen.lineWidth = 1;
  for (let t = Math.ceil(begin / step) * step; t < until; t += step) {
    pen.beginPath(); pen.moveTo(x(t), top - 8); pen.lineTo(x(t), below + bar + 4); pen.stroke();
    pen.textAlign = "center";
    if (t >= 0 && x(t) > left + 22 && x(t) < wide - 22) pen.fillText(seconds(t, step < 250 ? 1 : 2), x(t), top - 10);
  }
  pen.save();
  pen.beginPath(); pen.rect(left, 0, wide - left, high); pen.clip();
  pen.fillStyle = inks.soft;
  pen.fillRect(left, top, wide, bar); pen.fillRect(left, below, wide, bar);
  const seen = new Set();
  for (const { t, got, n, seq } of since(shown.passes, (pass) => pass.t[4] >= begin)) {
    if (t[2] > until) continue;
    if (t[2] - t[1] > 0.3) hatch(x(t[1]), top, x(t[2]) - x(t[1]), bar);
    if (!seen.has(t[2])) box(x(t[2]), top, x(t[4]) - x(t[2]), bar, inks.target, n === 0);
    seen.add(t[2]);
    if (x(t[4]) - x(t[2]) > 15) { pen.fillStyle = n === 0 ? inks.ink : inks.card; pen.textAlign = "center"; pen.fillText(n === 0 ? "prompt".slice(0, (x(t[4]) - x(t[2])) / 7) : `+${got}`, (x(t[2]) + x(t[4])) / 2, top + bar / 2 + 4); }
    if (!shown.alone.has(seq)) arrow(x(t[4]), top + bar, x(t[4]) + 2, below, inks.faint, true);
  }
  for (const draft of since(shown.drafts, (one) => one.t >= begin)) {
    if (draft.t > until) continue;
    for (let i = 0; i < draft.spans.length; i += 2) box(x(draft.spans[i]), below, x(draft.spans[i + 1]) - x(draft.spans[i]), bar, inks.draft);
    if (draft.n) arrow(x(draft.spans.length ? draft.spans.at(-1) : draft.t), below, x(draft.t), top + bar, inks.draft, false);
  }
  for (const note of since(shown.notes, (one) => one.t >= begin)) {
    pen.fillStyle = inks.bad;
    pen.fillRect(x(note.t) - 1, below - 4, 3, bar + 8);
    pen.textAlign = "right";
    pen.fillText(note.kind, x(note.t) - 5, below + bar / 2 + 4);
  }
  pen.restore();
}

function since(row, wanted) {
  let from = row.length;
  while (from > 0 && wanted(row[from - 1])) from--;
  return row.slice(Math.max(0, from - 1));
}

function box(x, y, wide, high, colour, hollow = false) {
  const inside = Math.max(1.2, wide - 0.8);
  pen.fillStyle = pen.strokeStyle = colour;
  pen.lineWidth = 2;
  if (hollow && inside > 4) pen.strokeRect(x + 1, y + 1, inside - 2, high - 2); else pen.fillRect(x, y, inside, high);
}

function hatch(x, y, wide, high) {
  pen.save();
  pen.beginPath(); pen.rect(x, y, wide, high); pen.clip();
  pen.strokeStyle = inks.wait;
  pen.lineWidth = 1.5;
  for (let at = x - high; at < x + wide; at += 5) { pen.beginPath(); pen.moveTo(at, y + high); pen.lineTo(at + high, y); pen.stroke(); }
  pen.restore();
}

function arrow(x1, y1, x2, y2, colour, dashed) {
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.2;
  pen.setLineDash(dashed ? [3, 3] : []);
  pen.beginPath(); pen.moveTo(x1, y1); pen.lineTo(x2, y2); pen.stroke();
  pen.setLineDash([]);
  const down = y2 > y1 ? -5 : 5;
  pen.beginPath(); pen.moveTo(x2, y2); pen.lineTo(x2 - 3, y2 + down); pen.lineTo(x2 + 3, y2 + down); pen.fill();
}

// The tree

function choose(text, place) {
  chosen = text && place >= 0 && place < text.passes.length - 1 ? { text, place } : text ? { text, place: null } : null;
  drawn.tree = null;
  drawn.version = -1;
}

// x is the depth; a leaf gets the next line, an inner node stands in the middle of its first and last child.
function tidy(nodes) {
  const children = nodes.map(() => []);
  nodes.forEach((node, place) => node.parent >= 0 && children[node.parent].push(place));
  let line = 0;
  const lay = (place, depth) => {
    nodes[place].x = depth;
    for (const child of children[place]) lay(child, depth + 1);
    const [first, last] = [children[place][0], children[place].at(-1)];
    nodes[place].y = first === undefined ? line++ : (nodes[first].y + nodes[last].y) / 2;
  };
  lay(0, 0);
  return { nodes, lines: line, depth: Math.max(...nodes.map((node) => node.x)) };
}

function nodesOf(pass) {
  const nodes = pass.tree.slice(0, MOST_SHOWN).map(([words, parent, logp, origin], place) => ({ words, parent, logp, kind: place ? kindOfRow(origin) : "root", origin }));
  nodes[0].on = true;
  let at = 0;
  for (const token of pass.tokens) {
    if (token.row !== null && token.row < nodes.length) { at = token.row; nodes[at].on = true; nodes[at].kind = kindOf(token); continue; }
    nodes.push({ words: token.text, parent: at, logp: token.q ? Math.log(token.q) : null, kind: kindOf(token), origin: token.from, on: true, picked: true });
    at = nodes.length - 1;
  }
  return nodes;
}

function drawTree() {
  const text = chosen?.text || shown.current, count = text?.passes.length || 0;
  const place = chosen?.place ?? count - 1, pass = text?.passes[place];
  if (drawn.tree === pass && drawn.count === count) return;
  Object.assign(drawn, { tree: pass, count });
  Object.assign($("passes"), { max: Math.max(0, count - 1), value: place });
  $("passname").textContent = pass ? `pass ${pass.n} of ${text.passes.at(-1).n}${chosen?.place == null && !text.ended ? ", live" : ""}` : "no pass yet";
  $("before").disabled = place <= 0;
  $("after").disabled = place >= count - 1;
  clear($("tree"));
  if (!pass) return;
  const { nodes, lines, depth } = tidy(nodesOf(pass)), wide = 96, high = 25, box = 80;
  const x = (node) => 2 + node.x * wide, y = (node) => 3 + node.y * high;
  const picture = svg("svg", { width: 4 + depth * wide + box, height: 4 + lines * high, role: "img" });
  picture.append(svg("title", {}, `${pass.rows} rows were read, ${pass.tokens.length} tokens committed`));
  for (const node of nodes) {
    if (node.parent < 0) continue;
    const from = nodes[node.parent], [x1, y1, x2, y2] = [x(from) + box, y(from) + 10, x(node), y(node) + 10], mid = (x1 + x2) / 2;
    picture.append(svg("path", { class: node.on ? "edge on" : "edge", "stroke-width": node.logp === null ? 1 : 0.8 + 2.4 * Math.exp(node.logp),
      d: `M${x1} ${y1}C${mid} ${y1} ${mid} ${y2} ${x2} ${y2}`, ...(node.picked ? { "stroke-dasharray": "3 3" } : {}) }));
  }
  for (const node of nodes) {
    const words = visible(node.words), one = svg("g", { class: `node${node.on ? " on" : ""}${node.kind === "root" ? " root" : ""}`, "data-kind": node.kind, transform: `translate(${x(node)} ${y(node)})` });
    one.append(svg("rect", { width: box, height: 20, rx: 4 }), svg("text", { x: 6, y: 14 }, words.length > 9 ? `${words.slice(0, 8)}…` : words),
      svg("title", {}, `${words}\n${node.kind === "root" ? "the root: the last token before the pass" : node.kind === "target" ? "the target’s own pick" : `by ${node.origin}${node.logp === null ? "" : `, ${percent(Math.exp(node.logp))}`}`}`));
    picture.append(one);
  }
  if (pass.tree.length > MOST_SHOWN) $("tree").append(make("p", { className: "hint", textContent: `The ${MOST_SHOWN} likeliest of ${pass.tree.length} rows` }));
  $("tree").append(picture);
  $("tree").scrollTop = y(nodes.findLast((node) => node.on)) - $("tree").clientHeight / 2;
}

// The figures

function drawFigures() {
  const text = chosen?.text || shown.current;
  const key = text ? `${text.label} ${text.passes.length} ${shown.drafts.length} ${shown.dropped}` : "";
  if (drawn.figures === key) return;
  drawn.figures = key;
  for (const id of ["speedbox", "depths", "origins"]) clear($(id));
  if (!text?.passes.length) return;
  const { ms, rate } = speed(text), from = text.passes[0].t[4], to = text.passes.at(-1).t[4], writing = text.passes.slice(1);
  const busyT = writing.reduce((sum, pass) => sum + (pass.t[4] - pass.t[2]) / 1, 0), waits = writing.reduce((sum, pass) => sum + pass.t[2] - pass.t[1], 0);
  let busyD = 0;
  for (const { spans } of shown.drafts) for (let i = 0; i < spans.length; i += 2) busyD += Math.max(0, Math.min(spans[i + 1], to) - Math.max(spans[i], from));
  const facts = { "tokens/s": rate ? rate.toFixed(1) : "–", "tokens a pass": writing.length ? ((text.tokens.length - text.passes[0].tokens.length) / writing.length).toFixed(2) : "–" };
  if (ms) Object.assign(facts, { "target busy": percent(busyT / ms), "target waits": percent(waits / ms), "drafter busy": busyD ? percent(busyD / ms) : "–" });
  facts.prompt = `${text.prompt ?? "–"} tokens${text.cached ? `, ${text.cached} kept` : ""}`;
  if (shown.dropped) facts["not seen"] = `${shown.dropped} events`;
  for (const [name, value] of Object.entries(facts)) $("speedbox").append(make("dt", { textContent: name }), make("dd", { textContent: value }));

  const offered = [], accepted = [];
  for (const pass of writing) {
    const depths = [];
    pass.tree.forEach(([, parent], place) => (depths[place] = parent < 0 ? 0 : depths[parent] + 1));
    for (let d = 1; d <= Math.max(...depths); d++) offered[d] = (offered[d] || 0) + 1;
    pass.tokens.forEach((token, place) => token.row !== null && (accepted[place + 1] = (accepted[place + 1] || 0) + 1));
  }
  if (offered.length < 2) $("depths").append(make("p", { className: "hint", textContent: "nothing was drafted" }));
  for (let d = 1; d < Math.min(offered.length, 9); d++) $("depths").append(meter(d, (accepted[d] || 0) / offered[d], `${accepted[d] || 0} of ${offered[d]}`, "draft"));

  const counts = new Map();
  for (const token of text.tokens) {
    const kind = kindOf(token), name = kind === "draft" ? token.from : kind === "target" ? "target" : kind;
    counts.set(name, { kind, count: (counts.get(name)?.count || 0) + 1 });
  }
  for (const [name, { kind, count }] of [...counts].sort((a, b) => b[1].count - a[1].count)) $("origins").append(meter(name === "draft" ? "drafted" : name, count / text.tokens.length, `${count}`, kind));
}

function meter(name, share, words, kind) {
  const bar = make("i");
  bar.style.width = `${100 * share}%`;
  const row = make("div", { className: "row" }, make("span", { textContent: name }), make("div", { className: "meter", role: "img", ariaLabel: `${name}: ${percent(share)}` }, bar), make("b", { textContent: words }));
  row.dataset.kind = kind;
  return row;
}

function drawNotes() {
  if (drawn.notes === shown.notes.length) return;
  drawn.notes = shown.notes.length;
  $("notes").replaceChildren(...shown.notes.slice(-6).map((note) => {
    const line = make("li", { textContent: `${seconds(note.t)}  ${note.what}` });
    line.dataset.kind = note.kind;
    return line;
  }));
  $("notes").scrollTop = $("notes").scrollHeight;
}

// The loop

const drawn = {};

function frame() {
  requestAnimationFrame(frame);
  if (replay) replay.step();
  const moving = replay || race.since !== null || (busy && !document.hidden);
  const recent = now() - shown.last < 6000;
  if (moving || drawn.version !== shown.version) {
    drawn.version = shown.version;
    drawTalk(replay ? replay.at : Infinity);
    if (!$("race").hidden) drawRace();
    drawTree();
    drawFigures();
    drawNotes();
  }
  if (recent || drawn.lanes) drawLanes(now());
  drawn.lanes = recent;
}

// Runs in files

const fileOf = () => ({ pearl_run: 1, saved: new Date().toISOString(), state: state && { ...state, may_kill: false },
  asked: asked.map((entry) => ({ ...entry })), events: shown.events, not_seen: shown.dropped });

function save(name, kind, words) {
  const address = URL.createObjectURL(new Blob([words], { type: kind }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function hashed(words) {
  if (!crypto.subtle) return "'unsafe-inline'"; // a page that came over plain HTTP from another machine
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(words));
  return `'sha256-${btoa(String.fromCharCode(...new Uint8Array(digest)))}'`;
}

// This page, its style, its script and the run in one file, which may ask nobody for anything.
async function wholePage() {
  const [page, style, script] = await Promise.all(["./", "style.css", "page.js"].map(async (path) => (await fetch(path)).text()));
  const run = JSON.stringify(fileOf()).replaceAll("<", "\\u003c");
  const policy = `default-src 'none'; script-src ${await hashed(script)}; style-src ${await hashed(style)}; img-src data:`;
  return page
    .replace('<meta charset="utf-8">', () => `<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="${policy}">`)
    .replace('<link rel="stylesheet" href="style.css">', () => `<style>${style}</style>`)
    .replace('<script type="module" src="page.js"><\/script>', () => `<script type="application/json" id="run">${run}<\/script>\n<script type="module">${script}<\/script>`);
}

class Replay {
  constructor(run) {
    if (run?.pearl_run !== 1 || !Array.isArray(run.events) || !Array.isArray(run.asked)) throw new Error("This file is no saved run of pearl.");
    this.run = run;
    this.events = run.events.map((event) => [Array.isArray(event.t) ? event.t[4] : event.t ?? 0, event]).sort((a, b) => a[0] - b[0]);
    const labelled = new Set(run.asked.map((entry) => entry.label));
    const first = this.events.find(([, event]) => labelled.has(event.label));
    [this.from, this.to] = [first ? first[0] - 100 : this.events[0]?.[0] ?? 0, (this.events.at(-1)?.[0] ?? 0) + 400];
    this.playing = false;
    this.seek(this.from);
  }

  seek(at) {
    this.at = at;
    this.next = 0;
    shown = new Store();
    shown.dropped = this.run.not_seen || 0;
    chosen = null;
    for (const view of Object.values(race.views)) view.reset();
    Object.assign(race, { a: null, b: null, since: null, over: true });
    for (const entry of this.run.asked) if (entry.view === "race") race[entry.side] = shown.text(entry.label);
    for (const [view] of views.values()) view.reset();
    for (const name of Object.keys(drawn)) delete drawn[name];
    this.catchUp();
  }

  catchUp() {
    while (this.next < this.events.length && this.events[this.next][0] <= this.at) shown.feed(this.events[this.next++][1]);
  }

  step() {
    const tick = performance.now();
    if (this.playing) {
      this.at = Math.min(this.to, this.at + (tick - this.tick) * Number($("speed").value));
      this.catchUp();
      if (this.at >= this.to) this.play(false);
      $("moment").value = (1000 * (this.at - this.from)) / (this.to - this.from);
    }
    $("clock").textContent = `${seconds(this.at - this.from, 1)} of ${seconds(this.to - this.from, 1)}`;
    this.tick = tick;
  }

  play(on = !this.playing) {
    if (on && this.at >= this.to) this.seek(this.from);
    this.playing = on;
    this.tick = performance.now();
    $("play").textContent = on ? "Pause" : "Play";
  }
}

function open(run) {
  try { replay = new Replay(run); } catch (error) { say(error.message, "bad"); return; }
  if (run.state) { $("pair").textContent = `${run.state.target} · drafted for by ${run.state.draft}`; }
  say(`a run of ${String(run.saved).slice(0, 10)}`, "replay");
  views.clear();
  clear($("talk"));
  for (const entry of run.asked) if (entry.view === "chat") turn(entry);
  for (const id of ["ask", "start", "save", "savepage"]) $(id).hidden = true;
  $("kill").hidden = true;
  $("replaybar").hidden = false;
  $("closereplay").hidden = standalone;
  if (!run.asked.some((entry) => entry.view === "chat")) tab("race");
  replay.seek(replay.from);
  replay.play(true);
  $("play").focus();
}

function close() {
  replay = null;
  shown = live;
  Object.assign(race, { a: null, b: null, over: false });
  for (const name of Object.keys(drawn)) delete drawn[name];
  views.clear();
  clear($("talk"));
  clear($("verdict"));
  for (const entry of asked) entry.view === "chat" ? turn(entry) : (race[entry.side] = live.text(entry.label));
  race.over = !!race.b?.ended;
  for (const id of ["ask", "start", "save", "savepage"]) $(id).hidden = false;
  $("replaybar").hidden = true;
  if (state) know(state);
}

// What a person does

function tab(name) {
  for (const one of ["chat", "race"]) {
    $(one).hidden = one !== name;
    $(`tab-${one}`).setAttribute("aria-selected", one === name);
    $(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
  drawn.version = -1;
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  for (const one of ["ink", "faint", "line", "soft", "card", "target", "draft", "wait", "bad"]) inks[one] = ink(one);
  drawn.lanes = true;
}

async function kill() {
  const response = await fetch("v1/pearl/kill", { method: "POST", headers: headers({ "X-Pearl-Page": "1" }) });
  if (!response.ok) { say(await problem(response), "bad"); return; }
  const { killed, t } = await response.json();
  live.feed({ e: "drafter", kind: "killed", what: `the drafter’s process ${killed} was killed from here; the text goes on`, t });
}

const dark = matchMedia("(prefers-color-scheme: dark)");
theme(kept.get("pearl-theme") || (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => kept.get("pearl-theme") || theme(dark.matches ? "dark" : "light"));
$("theme").onclick = () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  kept.put("pearl-theme", name);
  theme(name);
};
for (const name of ["chat", "race"]) {
  $(`tab-${name}`).onclick = () => tab(name);
  $(`tab-${name}`).onkeydown = (event) => {
    if (!event.key.startsWith("Arrow")) return;
    const other = name === "chat" ? "race" : "chat";
    tab(other);
    $(`tab-${other}`).focus();
  };
}
$("ask").onsubmit = ask;
$("start").onsubmit = start;
$("prompt").onkeydown = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && ask(event);
$("stop").onclick = () => stopping?.abort();
document.addEventListener("keydown", (event) => event.key === "Escape" && busy && stopping?.abort());
$("new").onclick = () => { messages = []; views.clear(); clear($("talk")); $("prompt").focus(); };
$("again").onclick = () => (race.since = performance.now());
$("kill").onclick = kill;
$("before").onclick = () => step(-1);
$("after").onclick = () => step(1);
$("passes").oninput = (event) => choose(chosen?.text || shown.current, event.target.valueAsNumber);
function step(by) {
  const text = chosen?.text || shown.current;
  if (text) choose(text, Math.max(0, (chosen?.place ?? text.passes.length - 1) + by));
}
$("window").onchange = () => (drawn.lanes = true);
$("save").onclick = () => save("pearl-run.json", "application/json", JSON.stringify(fileOf()));
$("savepage").onclick = async () => save("pearl-run.html", "text/html", await wholePage());
$("open").onclick = () => $("file").click();
$("file").onchange = async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  try { open(JSON.parse(await file.text())); } catch { say("This file is no saved run of pearl.", "bad"); }
  event.target.value = "";
};
$("play").onclick = () => replay?.play();
$("moment").oninput = (event) => { replay.play(false); replay.seek(replay.from + (event.target.valueAsNumber / 1000) * (replay.to - replay.from)); };
$("closereplay").onclick = close;
$("keyform").onsubmit = (event) => {
  event.preventDefault();
  const key = $("apikey").value.trim();
  if (!/^[\x21-\x7e]*$/.test(key)) { say("an API key has plain letters and no spaces", "bad"); return; }
  kept.put("pearl-key", key);
  listen();
};

const standalone = $("run") !== null;
requestAnimationFrame(frame);
if (standalone) open(JSON.parse($("run").textContent));
else listen();
