// The page of a pearl server: what two devices do for a text, as it happens, or from a run that was saved.
//
// A `Store` is fed with events (pearl/server/seen.py says what they are) and knows texts and passes. Everything on the
// screen is drawn from a store: the live one, which the server's stream feeds, or one that a file feeds on a clock of
// its own. All words of models and users go through textContent.
//
// It is one file, as nothing builds it: "Save as page" puts it whole into a page that may load nothing, where modules
// could not import each other. In this order: what is known, the server, a text, the talk, the race, the lanes, the
// tree, the figures, the loop, runs in files, what a person does.

const $ = (id) => document.getElementById(id);
const make = (tag, facts = {}, ...inside) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
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
// What is read out when it changes is written only then.
const tell = (element, words) => { if (element.textContent !== words) element.textContent = words; };
const seconds = (ms, digits = 2) => `${(ms / 1000).toFixed(digits)} s`;
const percent = (x) => `${(100 * x).toFixed(0)} %`;
const kept = {
  get: (name) => { try { return sessionStorage.getItem(name) || ""; } catch { return ""; } },
  put: (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* a file keeps nothing */ } },
};

const KEY = [...crypto.getRandomValues(new Uint8Array(8))].map((x) => x.toString(16).padStart(2, "0")).join("");
const MOST_EVENTS = 60000, MOST_SHOWN = 40; // events that are kept; nodes of a tree that are drawn
const KINDS = {
  draft: "drafted",
  prepared: "prepared correction",
  feature: "feature drafter",
  suffix: "suffix",
  recycled: "recycled",
  target: "the target’s own",
};

const kindOfRow = (origin) => (["feature", "suffix", "recycled"].includes(origin) ? origin : "draft");
const kindOf = (token) => {
  if (token.from === "target" || token.rank === null) return "target";
  const kind = kindOfRow(token.from);
  const drafted = kind === "draft" || kind === "feature"; // by a drafter that may be in either process
  return drafted && token.rank > 0 ? "prepared" : kind;
};
// When an event was over.
const momentOf = (event) => (Array.isArray(event.t) ? event.t[4] : event.t);

// What is known

class Store {
  constructor() {
    this.events = []; this.texts = new Map(); this.bySequence = new Map(); this.alone = new Set();
    this.passes = []; this.drafts = []; this.notes = []; this.last = 0; this.version = 0;
    this.dropped = 0; this.forgotten = 0; // events that never came, and those that are kept no longer
  }

  // Sequence numbers are one server's: another one begins anew.
  renew() {
    this.bySequence.clear();
    this.alone.clear();
  }

  text(label) {
    if (!this.texts.has(label)) this.texts.set(label, { label, tokens: [], passes: [], content: null, others: 0 });
    return this.texts.get(label);
  }

  feed(event) {
    this.version++;
    this.events.push(event);
    if (this.events.length > MOST_EVENTS) this.forgotten += this.events.splice(0, 1000).length;
    const text = this.bySequence.get(event.seq);
    if (event.e === "began" && event.mode.startsWith("ar")) this.alone.add(event.seq); // no drafter hears of it
    if (event.e === "began" && event.label) {
      const { mode, t: began, prompt, cached } = event;
      const begun = Object.assign(this.text(event.label), { mode, began, prompt, cached });
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
let shown = live, state = null, asked = [], replay = null, chosen = null;
// Times of events are moved to this page's clock, so that those of a server that was started anew follow the earlier
// ones. `run`: of which server; `shift`: what is added; `offset`: how far what is shown is behind.
const clock = { run: "", shift: 0, offset: 0 };
const now = () => (replay ? replay.at : performance.now() - clock.offset);

// The server

const headers = (more = {}) => {
  const key = kept.get("pearl-key");
  return { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...more };
};
const wait = (ms) => new Promise((go) => setTimeout(go, ms));

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
      if (!told.modes) {
        say(told.status, told.status === "loading" ? "loading" : "bad");
        await wait(pause);
        continue;
      }
      $("keyform").hidden = true;
      know(told);
      say(told.status, told.status);
      const response = await fetch(`v1/pearl/events?key=${KEY}`, { headers: headers() });
      if (!response.ok) throw new Error(await problem(response));
      pause = 500;
      for await (const line of lines(response)) {
        const event = JSON.parse(line);
        if (event.e === "hello") meet(event);
        else hear(event);
      }
      say("the server has gone", "bad");
    } catch (error) {
      say(String(error.message).includes("fetch") ? "no connection" : error.message, "bad");
    }
    await wait(pause);
  }
}

// A stream begins: the server says who it is, the time, and how its drafter is.
function meet({ run, t, degraded }) {
  if (run !== clock.run) {
    Object.assign(clock, { run, shift: Math.round(performance.now() - t) });
    live.renew();
  }
  clock.offset = performance.now() - t - clock.shift;
  sayDegraded(degraded);
}

function sayDegraded(is) {
  if (is) say("degraded: the target writes alone", "degraded");
  else say("ready", "ready");
}

function hear(event) {
  const moved = (t) => t + clock.shift;
  if (event.t !== undefined) event.t = Array.isArray(event.t) ? event.t.map(moved) : moved(event.t);
  if (event.spans) event.spans = event.spans.map(moved);
  if (event.t !== undefined) clock.offset = Math.min(clock.offset, performance.now() - momentOf(event));
  live.feed(event);
  if (event.e === "drafter") sayDegraded(event.degraded);
}

async function problem(response) {
  try { return (await response.json()).error.message; } catch { return `the server says ${response.status}`; }
}

const named = ({ target, draft }) => (draft ? `${target} · drafted for by ${draft}` : target);

function know(found) {
  state = found;
  $("pair").textContent = named(found);
  $("pair").title = (found.where || []).join("\n");
  $("kill").hidden = !found.may_kill || !!replay;
  const tree = found.modes.includes("tree") ? "tree" : found.mode;
  for (const [id, wanted] of [["mode", found.mode], ["mode-a", "ar"], ["mode-b", tree]]) {
    if ([...$(id).options].map((one) => one.value).join() === found.modes.join()) continue;
    const options = found.modes.map((mode) => make("option", { value: mode, textContent: mode }));
    $(id).replaceChildren(...options);
    $(id).value = wanted;
  }
}

let heard = ["", ""]; // what was said last of the server: a run hides it while it is shown

function say(words, is) {
  heard = [words, is];
  if (!replay) mark(words, is);
}

function mark(words, is) {
  tell($("status"), words);
  $("status").dataset.is = is;
}

// Asks for a text and follows it to its end. The words come by the answer's own stream, which misses nothing.
async function write(entry, body, signal) {
  const text = live.text(entry.label);
  text.content = "";
  choose(null); // what is written now is shown
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, {
    method: "POST",
    signal,
    headers: headers({ "Content-Type": "application/json", "X-Pearl-Label": entry.label }),
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

const newSeed = () => Math.floor(Math.random() * 2 ** 31);
const body = (messages, mode, max_tokens, temperature, seed) => ({
  ...(state.chat ? { messages } : { prompt: messages.map((one) => one.content).join("") }),
  mode, max_tokens, temperature, seed,
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
    this.element.setAttribute("aria-describedby", "tip");
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
    if (upto && text.tokens[upto - 1].pass.t[4] > until) {
      this.reset();
      upto = 0;
    }
    while (upto < text.tokens.length && text.tokens[upto].pass.t[4] <= until) upto++;
    const follow = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 60;
    for (; this.count < upto; this.count++) {
      const token = text.tokens[this.count];
      if (text.content && token.at > this.end) { // events were dropped
        const words = [...text.content].slice(this.end, token.at).join("");
        const title = "What happened here was not seen";
        this.tail.before(make("span", { className: "unseen", textContent: words, title }));
      }
      this.end = token.at + [...token.text].length;
      if (!token.text) continue;
      const span = make("span", { className: "tok", textContent: token.text });
      span.dataset.kind = kindOf(token);
      span.dataset.pass = token.pass.n;
      const deep = `${Math.min(10 + 4 * token.depth, 38)}%`;
      if (span.dataset.kind !== "target") span.style.setProperty("--deep", deep);
      span.token = token;
      this.spans.push(span);
      this.tail.before(span);
    }
    const rest = until === Infinity && text.content !== null ? [...text.content].slice(this.end).join("") : "";
    if (this.tail.data !== rest) this.tail.data = rest;
    if (follow) this.element.scrollTop = this.element.scrollHeight;
  }

  choose(span) {
    choose(this.text, this.text.passes.indexOf(span.token.pass));
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Enter" && this.spans[this.at]) this.choose(this.spans[this.at]);
    if (!step || !this.spans.length) return;
    event.preventDefault();
    this.at = Math.max(0, Math.min(this.spans.length - 1, (this.at ?? -1) + step));
    this.spans[this.at].scrollIntoView({ block: "nearest" });
    point(this, this.spans[this.at]);
    $("heard").textContent = `${this.spans[this.at].textContent}: ${$("tip").textContent}`;
  }
}

function point(view, span) {
  for (const old of document.querySelectorAll(".tok.here, .tok.pass")) old.classList.remove("here", "pass");
  $("tip").hidden = !span;
  if (!span) return;
  const token = span.token, kind = span.dataset.kind;
  for (const other of view.spans) if (other.token.pass === token.pass) other.classList.add("pass");
  span.classList.add("here");
  const by = kind !== "target" && token.from !== kind ? ` (by ${token.from})` : "";
  const told = [`${KINDS[kind]}${by}`];
  told.push(`pass ${token.pass.n}, depth ${token.depth} of ${token.pass.tokens.length}, ${token.pass.rows} rows read`);
  if (token.q !== null) told.push(`the drafter’s probability ${percent(token.q)}, its guess no. ${token.rank + 1}`);
  if (token.p !== undefined) told.push(`the target’s probability ${percent(token.p)}`);
  if (kind !== "target" && token.row === null) told.push("it came too late to be read: the next pass begins with it");
  const { tree } = token.pass, parent = token.row === null ? null : tree[token.row][1];
  const others = tree.filter((row, place) => row[1] === parent && place !== token.row).slice(0, 5);
  if (others.length) told.push(`other guesses there: ${others.map((row) => visible(row[0])).join(" ")}`);
  $("tip").textContent = told.join("\n");
  const box = span.getBoundingClientRect(), tip = $("tip");
  const above = box.bottom + tip.offsetHeight + 14 > innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
}

const visible = (words) => words.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

// The talk

let messages = [], stopping = null, busy = false; // messages: of the talk; the last is a user's while an answer comes
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
  const told = views.get(entry.label)[1], talk = messages; // a new talk has messages of its own
  talk.push({ role: "user", content: prompt });
  const most = $("tokens").valueAsNumber || 256, temperature = $("temperature").valueAsNumber || 0;
  await working(async (signal) => {
    try {
      const asking = body(talk, entry.mode, most, temperature, newSeed());
      await write(entry, { ...asking, logprobs: state.chat ? true : 0 }, signal); // of each token alone
    } catch (error) {
      if (error.name !== "AbortError") { told.textContent = error.message; told.classList.add("bad"); }
    }
    const text = live.text(entry.label);
    text.over = true;
    if (text.content) talk.push({ role: "assistant", content: text.content });
    else talk.pop();
  });
}

function newTalk() {
  if (messages.at(-1)?.role === "user") stopping.abort();
  messages = [];
  views.clear();
  clear($("talk"));
  $("prompt").focus();
}

async function working(work) {
  stopping = new AbortController();
  const set = (at) => {
    busy = at;
    for (const id of ["send", "go", "open"]) $(id).disabled = at;
    $("stop").disabled = !at;
    $("talk").setAttribute("aria-busy", at); // what grows is read out once it is over
  };
  set(true);
  try { await work(stopping.signal); } finally {
    set(false);
    live.version++;
  }
}

function drawTalk(until) {
  for (const [name, [view, told]] of views) {
    const text = shown.text(name);
    if (replay) view.element.hidden = view.element.previousSibling.hidden = told.hidden = !text.began;
    const follow = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
    view.show(text, until);
    if (!told.classList.contains("bad")) tell(told, summary(text));
    if (follow && !text.settled) $("talk").scrollTop = $("talk").scrollHeight;
    if (text.ended || text.over) text.settled = true;
  }
}

function summary(text) {
  if (!text.passes.length) return text.began ? "reading the prompt" : text.over ? "" : "waiting for a place";
  const drafted = text.tokens.filter((token) => kindOf(token) !== "target").length;
  const { rate } = speed(text), told = [text.mode, `${text.tokens.length} tokens in ${text.passes.length} passes`];
  told.push(`${drafted} had been guessed`);
  if (rate) told.push(`${rate.toFixed(1)} tokens/s`);
  if (text.finish === "length") told.push("ended at the limit");
  else if (!text.ended && text.over) told.push("stopped");
  return told.join(" · ");
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
  const most = $("racetokens").valueAsNumber || 160, seed = newSeed(), talk = [{ role: "user", content: prompt }];
  await working(async (signal) => {
    try {
      for (const entry of sides) {
        entry.label = label();
        asked.push(entry);
        race[entry.side] = live.text(entry.label);
        await write(entry, body(talk, entry.mode, most, 0, seed), signal);
        for (let tries = 0; tries < 40 && !race[entry.side].ended; tries++) await wait(25);
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
  const started = race.b?.passes[0], first = started || race.a?.passes[0];
  if (race.since !== null) return performance.now() - race.since;
  if (replay) return first ? now() - first.t[4] : 0;
  if (started && !(race.over && race.a?.ended)) return now() - started.t[4];
  return Infinity;
}

function drawRace() {
  let at = raceClock();
  const longest = Math.max(...["a", "b"].map((side) => (race[side] ? speed(race[side]).ms : 0)));
  if (race.since !== null && at > longest + 300) {
    race.since = null;
    at = Infinity;
  }
  const most = Math.max(1, ...["a", "b"].map((side) => race[side]?.tokens.length || 0));
  for (const side of ["a", "b"]) drawLane(side, at, most);
  verdict();
  $("again").disabled = busy || !race.over || !!replay;
}

// `at`: how far the race's clock is; `most`: tokens of the longer text.
function drawLane(side, at, most) {
  const lane = $(`lane-${side}`), text = race[side], first = text?.passes[0];
  const [title, watch, flag, bar] = ["h2", ".clock", ".flag", "i"].map((what) => lane.querySelector(what));
  title.textContent = text?.mode || $(`mode-${side}`).value || "";
  if (!first) {
    flag.hidden = true;
    watch.textContent = text?.began ? "reading the prompt" : "";
    bar.style.width = "0";
    race.views[side].reset();
    return;
  }
  const { ms } = speed(text), passes = text.passes.length;
  const again = race.since !== null || (side === "a" && race.b?.passes.length && !race.over && !replay);
  race.views[side].show(text, at === Infinity ? Infinity : first.t[4] + at + 0.01);
  const count = at === Infinity ? text.tokens.length : race.views[side].count, done = text.ended && at >= ms;
  const told = [seconds(Math.min(at, ms)), `${count} tokens`];
  told.push(`${passes > 1 ? (text.tokens.length / passes).toFixed(2) : "–"} a pass`);
  if (again) told.push("from its record");
  watch.textContent = told.join(" · ");
  bar.style.width = `${(100 * count) / most}%`;
  flag.hidden = !done;
  flag.textContent = done ? seconds(ms) : "";
}

function verdict() {
  const { a, b } = race;
  if (!a?.ended || !b?.ended) {
    const first = "First the one, then the other: they share one target.";
    if (busy && a) tell($("verdict"), b ? "Now the second, and the first once more beside it from its record." : first);
    return;
  }
  const [one, other] = [speed(a).ms, speed(b).ms];
  const parted = a.tokens.findIndex((token, place) => token.id !== b.tokens[place]?.id);
  const same = parted < 0 && a.tokens.length === b.tokens.length;
  const summed = ", as ar-all adds up on other cores or devices, in another order.";
  const from = `The texts differ from token ${(parted < 0 ? a.tokens.length : parted) + 1} on`;
  const differ = from + ([a.mode, b.mode].includes("ar-all") ? summed : "!");
  const missed = shown.dropped ? ` ${shown.dropped} events were not seen.` : "";
  const others = a.others + b.others ? " Other texts were written meanwhile, so this is no fair race." : "";
  const times = `${a.mode} ${seconds(one)}, ${b.mode} ${seconds(other)}`;
  const key = [one, other, same, missed, others].join();
  if ($("verdict").dataset.key === key && $("verdict").querySelector("b")) return;
  $("verdict").dataset.key = key;
  $("verdict").replaceChildren(
    make("b", { textContent: one && other ? `${(one / other).toFixed(2)}×` : "–" }), // one pass takes no time
    ` ${times} from the first token to the last, as measured here. `,
    make("span", { id: "same", textContent: same ? `The same text, ${a.tokens.length} tokens.` : differ }),
    missed + others,
  );
}

// The lanes

const canvas = $("lanes"), pen = canvas.getContext("2d");
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
let inks = {};

function drawLanes(until) {
  const wide = canvas.clientWidth, high = canvas.clientHeight, ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(wide * ratio)) {
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(high * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, wide, high);
  const left = 62, span = Number($("window").value), begin = until - span;
  const x = (t) => left + ((t - begin) / span) * (wide - left - 6);
  const top = 24, bar = 40, gap = 34, below = top + bar + gap;
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = inks.faint;
  pen.textAlign = "left";
  pen.fillText("target", 4, top + bar / 2 + 4);
  pen.fillText("drafter", 4, below + bar / 2 + 4);
  const step = [100, 250, 500, 1000, 2500].find((one) => (one / span) * (wide - left) > 48) || 5000;
  pen.strokeStyle = inks.line;
  pen.lineWidth = 1;
  for (let t = Math.ceil(begin / step) * step; t < until; t += step) {
    line(x(t), top - 8, x(t), below + bar + 4);
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
    const room = x(t[4]) - x(t[2]);
    if (room > 15) {
      pen.fillStyle = n === 0 ? inks.ink : inks.card;
      pen.textAlign = "center";
      pen.fillText(n === 0 ? "prompt".slice(0, room / 7) : `+${got}`, x(t[2]) + room / 2, top + bar / 2 + 4);
    }
    if (!shown.alone.has(seq)) arrow(x(t[4]), top + bar, x(t[4]) + 2, below, inks.faint, true);
  }
  for (const draft of since(shown.drafts, (one) => one.t >= begin)) {
    if (draft.t > until) continue;
    for (const [from, to] of pairs(draft.spans)) box(x(from), below, x(to) - x(from), bar, inks.draft);
    if (draft.n) arrow(x(draft.spans.at(-1) ?? draft.t), below, x(draft.t), top + bar, inks.draft, false);
  }
  for (const note of since(shown.notes, (one) => one.t >= begin)) {
    pen.fillStyle = inks.bad;
    pen.fillRect(x(note.t) - 1, below - 4, 3, bar + 8);
    pen.textAlign = "right";
    pen.fillText(note.kind, x(note.t) - 5, below + bar / 2 + 4);
  }
  pen.restore();
}

const pairs = (spans) => spans.flatMap((from, place) => (place % 2 ? [] : [[from, spans[place + 1]]]));

function since(row, wanted) {
  let from = row.length;
  while (from > 0 && wanted(row[from - 1])) from--;
  return row.slice(Math.max(0, from - 1));
}

function box(x, y, wide, high, colour, hollow = false) {
  const inside = Math.max(1.2, wide - 0.8);
  pen.fillStyle = pen.strokeStyle = colour;
  pen.lineWidth = 2;
  if (hollow && inside > 4) pen.strokeRect(x + 1, y + 1, inside - 2, high - 2);
  else pen.fillRect(x, y, inside, high);
}

function line(x1, y1, x2, y2) {
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
}

function hatch(x, y, wide, high) {
  pen.save();
  pen.beginPath(); pen.rect(x, y, wide, high); pen.clip();
  pen.strokeStyle = inks.wait;
  pen.lineWidth = 1.5;
  for (let at = x - high; at < x + wide; at += 5) line(at, y + high, at + high, y);
  pen.restore();
}

function arrow(x1, y1, x2, y2, colour, dashed) {
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.2;
  pen.setLineDash(dashed ? [3, 3] : []);
  line(x1, y1, x2, y2);
  pen.setLineDash([]);
  const down = y2 > y1 ? -5 : 5;
  pen.beginPath(); pen.moveTo(x2, y2); pen.lineTo(x2 - 3, y2 + down); pen.lineTo(x2 + 3, y2 + down); pen.fill();
}

// The tree

// The last pass is none in particular: the next one takes its place.
function choose(text, place) {
  chosen = text ? { text, place: place >= 0 && place < text.passes.length - 1 ? place : null } : null;
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
  const nodes = pass.tree.slice(0, MOST_SHOWN).map(([words, parent, logp, origin], place) => (
    { words, parent, logp, origin, kind: place ? kindOfRow(origin) : "root" }
  ));
  nodes[0].on = true;
  let at = 0;
  for (const token of pass.tokens) {
    const kind = kindOf(token);
    if (token.row !== null && token.row < nodes.length) {
      at = token.row;
      Object.assign(nodes[at], { kind, on: true });
      continue;
    }
    const logp = token.q ? Math.log(token.q) : null;
    nodes.push({ words: token.text, parent: at, logp, kind, origin: token.from, on: true, picked: true });
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
  const follows = chosen?.place == null && !text?.ended ? ", live" : "";
  $("passname").textContent = pass ? `pass ${pass.n} of ${text.passes.at(-1).n}${follows}` : "no pass yet";
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
    const from = nodes[node.parent], [x1, y1, x2, y2] = [x(from) + box, y(from) + 10, x(node), y(node) + 10];
    const mid = (x1 + x2) / 2;
    picture.append(svg("path", {
      class: node.on ? "edge on" : "edge",
      d: `M${x1} ${y1}C${mid} ${y1} ${mid} ${y2} ${x2} ${y2}`,
      "stroke-width": node.logp === null ? 1 : 0.8 + 2.4 * Math.exp(node.logp),
      ...(node.picked ? { "stroke-dasharray": "3 3" } : {}),
    }));
  }
  for (const node of nodes) {
    const words = visible(node.words), kinds = ["node", node.on && "on", node.kind === "root" && "root"];
    picture.append(svg(
      "g",
      { class: kinds.filter(Boolean).join(" "), "data-kind": node.kind, transform: `translate(${x(node)} ${y(node)})` },
      svg("rect", { width: box, height: 20, rx: 4 }),
      svg("text", { x: 6, y: 14 }, words.length > 9 ? `${words.slice(0, 8)}…` : words),
      svg("title", {}, `${words}\n${whose(node)}`),
    ));
  }
  const most = `The ${MOST_SHOWN} likeliest of ${pass.tree.length} rows`;
  if (pass.tree.length > MOST_SHOWN) $("tree").append(make("p", { className: "hint", textContent: most }));
  $("tree").append(picture);
  $("tree").scrollTop = y(nodes.findLast((node) => node.on)) - $("tree").clientHeight / 2;
}

function whose(node) {
  if (node.kind === "root") return "the root: the last token before the pass";
  if (node.kind === "target") return "the target’s own pick";
  return `by ${node.origin}${node.logp === null ? "" : `, ${percent(Math.exp(node.logp))}`}`;
}

// The figures

function drawFigures() {
  const text = chosen?.text || shown.current;
  const seen = [text?.label, text?.passes.length, shown.drafts.length, shown.dropped, shown.forgotten].join(" ");
  if (drawn.figures === seen) return;
  drawn.figures = seen;
  for (const id of ["speedbox", "depths", "origins"]) clear($(id));
  if (!text?.passes.length) return;
  for (const [name, value] of Object.entries(figures(text))) {
    $("speedbox").append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  }
  drawDepths(text.passes.slice(1));
  const counts = new Map();
  for (const token of text.tokens) {
    const kind = kindOf(token), name = kind === "draft" ? token.from : kind;
    counts.set(name, { kind, count: (counts.get(name)?.count || 0) + 1 });
  }
  for (const [name, { kind, count }] of [...counts].sort((a, b) => b[1].count - a[1].count)) {
    const shownAs = name === "draft" ? "drafted" : name;
    $("origins").append(meter(shownAs, count / text.tokens.length, `${count}`, kind));
  }
}

function figures(text) {
  const { ms, rate } = speed(text), [first, ...writing] = text.passes, from = first.t[4], to = text.passes.at(-1).t[4];
  const sum = (row, of) => row.reduce((sofar, one) => sofar + of(one), 0);
  const facts = { "tokens/s": rate ? rate.toFixed(1) : "–" };
  const written = text.tokens.length - first.tokens.length;
  facts["tokens a pass"] = writing.length ? (written / writing.length).toFixed(2) : "–";
  if (ms) {
    const drafting = sum(shown.drafts.flatMap(({ spans }) => pairs(spans)),
      ([begin, end]) => Math.max(0, Math.min(end, to) - Math.max(begin, from)));
    facts["target busy"] = percent(sum(writing, (pass) => pass.t[4] - pass.t[2]) / ms);
    facts["target waits"] = percent(sum(writing, (pass) => pass.t[2] - pass.t[1]) / ms);
    facts["drafter busy"] = drafting ? percent(drafting / ms) : "–";
  }
  facts.prompt = `${text.prompt ?? "–"} tokens${text.cached ? `, ${text.cached} kept` : ""}`;
  if (shown.dropped) facts["not seen"] = `${shown.dropped} events`;
  if (shown.forgotten) facts["not kept"] = `${shown.forgotten} events`;
  return facts;
}

// Of the passes with guesses of a depth: in how many that of the text was among them.
function drawDepths(passes) {
  const offered = [], accepted = [];
  for (const pass of passes) {
    const depths = [];
    pass.tree.forEach(([, parent], place) => (depths[place] = parent < 0 ? 0 : depths[parent] + 1));
    for (let d = 1; d <= Math.max(...depths); d++) offered[d] = (offered[d] || 0) + 1;
    pass.tokens.forEach((token, place) => {
      if (token.row !== null) accepted[place + 1] = (accepted[place + 1] || 0) + 1;
    });
  }
  if (offered.length < 2) $("depths").append(make("p", { className: "hint", textContent: "nothing was drafted" }));
  for (let d = 1; d < Math.min(offered.length, 9); d++) {
    const count = accepted[d] || 0;
    $("depths").append(meter(d, count / offered[d], `${count} of ${offered[d]}`, "draft"));
  }
}

function meter(name, share, words, kind) {
  const bar = make("i");
  bar.style.width = `${100 * share}%`;
  const row = make(
    "div",
    { className: "row" },
    make("span", { textContent: name }),
    make("div", { className: "meter", role: "img", ariaLabel: `${name}: ${percent(share)}` }, bar),
    make("b", { textContent: words }),
  );
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
    draw();
  }
  if (recent || drawn.lanes) drawLanes(now());
  drawn.lanes = recent;
}

function draw() {
  drawTalk(replay ? replay.at : Infinity);
  if (!$("race").hidden) drawRace();
  drawTree();
  drawFigures();
  drawNotes();
}

// Runs in files

const fileOf = () => ({
  pearl_run: 1,
  saved: new Date().toISOString(),
  state: state && { ...state, may_kill: false },
  asked: asked.map((entry) => ({ ...entry })),
  events: shown.events,
  not_seen: shown.dropped,
  not_kept: shown.forgotten,
});

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
  const files = ["./", "style.css", "page.js"].map(async (path) => (await fetch(path)).text());
  const [page, style, script] = await Promise.all(files), charset = '<meta charset="utf-8">';
  const run = JSON.stringify(fileOf()).replaceAll("<", "\\u003c");
  const allowed = `script-src ${await hashed(script)}; style-src ${await hashed(style)}; img-src data:`;
  const policy = `<meta http-equiv="Content-Security-Policy" content="default-src 'none'; ${allowed}">`;
  const scripts = [`<script type="application/json" id="run">${run}<\/script>`];
  scripts.push(`<script type="module">${script}<\/script>`);
  return page
    .replace(charset, () => `${charset}\n${policy}`)
    .replace('<link rel="stylesheet" href="style.css">', () => `<style>${style}</style>`)
    .replace('<script type="module" src="page.js"><\/script>', () => scripts.join("\n"));
}

class Replay {
  constructor(run) {
    if (run?.pearl_run !== 1 || !Array.isArray(run.asked)) throw new Error("no run");
    this.run = run;
    this.events = run.events.map((event) => [momentOf(event) ?? 0, event]).sort((a, b) => a[0] - b[0]);
    const labelled = new Set(run.asked.map((entry) => entry.label));
    const first = this.events.find(([, event]) => labelled.has(event.label));
    this.from = first ? first[0] - 100 : this.events[0]?.[0] ?? 0;
    this.to = (this.events.at(-1)?.[0] ?? 0) + 400;
    this.playing = false;
  }

  seek(at) {
    this.at = at;
    this.next = 0;
    shown = new Store();
    shown.dropped = this.run.not_seen || 0;
    shown.forgotten = this.run.not_kept || 0;
    Object.assign(race, { a: null, b: null, since: null, over: true });
    for (const entry of this.run.asked) if (entry.view === "race") race[entry.side] = shown.text(entry.label);
    drawAnew();
    this.catchUp();
  }

  catchUp() {
    const { events } = this;
    while (this.next < events.length && events[this.next][0] <= this.at) shown.feed(events[this.next++][1]);
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

// What was drawn is of another store.
function drawAnew() {
  chosen = null;
  for (const view of Object.values(race.views)) view.reset();
  if (replay) for (const [view] of views.values()) view.reset();
  for (const name of Object.keys(drawn)) delete drawn[name];
}

// `words`: what is in the file. Of a damaged one nothing stays.
function open(words) {
  const before = replay;
  try {
    show(new Replay(JSON.parse(words)));
  } catch {
    if (replay !== before) before ? show(before) : close();
    mark("This file is no saved run of pearl.", before ? "replay" : "bad");
  }
}

let aside = null; // of the live page, while a run is shown

function show(made) {
  const { run } = made;
  aside ??= {
    nodes: [...$("talk").childNodes],
    texts: [...views],
    race: { a: race.a, b: race.b, over: race.over },
    tab: $("race").hidden ? "chat" : "race",
  };
  replay = made;
  if (run.state) $("pair").textContent = named(run.state);
  mark(`a run of ${String(run.saved).slice(0, 10)}`, "replay");
  views.clear();
  clear($("talk"));
  for (const entry of run.asked) if (entry.view === "chat") turn(entry);
  for (const id of ["ask", "start", "save", "savepage"]) $(id).hidden = true;
  $("kill").hidden = true;
  $("replaybar").hidden = false;
  $("closereplay").hidden = standalone;
  if (!run.asked.some((entry) => entry.view === "chat")) tab("race");
  for (const at of [replay.to, replay.from]) { // its end too, where all that may be damaged is met
    replay.seek(at);
    draw();
    drawLanes(at);
  }
  replay.play(true);
  $("play").focus();
}

function close() {
  replay = null;
  shown = live;
  Object.assign(race, aside.race, { since: null });
  views.clear();
  for (const [name, view] of aside.texts) views.set(name, view);
  $("talk").replaceChildren(...aside.nodes);
  tab(aside.tab);
  aside = null;
  drawAnew();
  clear($("verdict"));
  for (const id of ["ask", "start", "save", "savepage"]) $(id).hidden = false;
  $("replaybar").hidden = true;
  if (state) know(state);
  mark(...heard);
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
  const names = ["ink", "faint", "line", "soft", "card", "target", "draft", "wait", "bad"];
  for (const one of names) inks[one] = ink(one);
  drawn.lanes = true;
}

async function kill() {
  const response = await fetch("v1/pearl/kill", { method: "POST", headers: headers({ "X-Pearl-Page": "1" }) });
  if (!response.ok) { say(await problem(response), "bad"); return; }
  const { killed, t } = await response.json();
  const what = `the drafter’s process ${killed} was killed from here; the text goes on`;
  live.feed({ e: "drafter", kind: "killed", what, t: t + clock.shift });
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
$("prompt").onkeydown = (event) => { // returns nothing: false would keep the key from the box
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
};
$("stop").onclick = () => stopping?.abort();
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!$("tip").hidden) point(null);
  else if (busy) stopping.abort();
});
$("new").onclick = newTalk;
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
  open(await file.text());
  event.target.value = "";
};
$("play").onclick = () => replay?.play();
$("moment").oninput = (event) => {
  replay.play(false);
  replay.seek(replay.from + (event.target.valueAsNumber / 1000) * (replay.to - replay.from));
};
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
if (standalone) open($("run").textContent);
else listen();
