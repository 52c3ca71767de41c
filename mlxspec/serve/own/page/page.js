// The page itself: what is asked, what is written, and what is seen of the server.

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const EVERY_MS = 1500;
const ROUNDS = 60;

const seen = { stats: null, rounds: [], rows: new Map(), curve: "", lost: 0 };
let mode = "write";
let running = null; // the AbortController of what is written now

// --- who wrote what ----------------------------------------------------------------------------

function classOf(author) {
  if (author === "target" || author === "") return "target";
  if (author === "prediction") return "prediction";
  return seen.stats?.server.drafters.includes(author) ? "draft" : "history";
}

// --- a text that is written --------------------------------------------------------------------

class Lane {
  constructor(element, { title = "", empty = "", beside = false } = {}) {
    this.beside = beside; // another lane, which its speed is compared with
    this.speed = make("dd", {}, "–");
    this.kept = make("dd", {}, "–");
    this.each = make("dd", {}, "–");
    this.bar = make("i");
    this.text = make("div", { class: "text", tabindex: "0", role: "region", "aria-label": title || "The text", "data-empty": empty });
    this.said = make("p", { class: "said note", role: "status" });
    const figure = (name, value) => make("div", {}, make("dt", {}, name), value);
    element.replaceChildren(
      ...(title ? [make("h3", {}, title)] : []),
      make("dl", { class: "figures" }, figure("Speed", this.speed), figure("Kept", this.kept), figure("Tokens a round", this.each)),
      make("div", { class: "pace" }, this.bar),
      this.text,
      this.said,
    );
    Object.assign(this, { tokens: [], others: 0, rounds: 0, drafted: 0, accepted: 0 });
    Object.assign(this, { firstMs: 0, firstCount: 0, rate: 0, finish: "", length: 0 });
  }

  // Let a text be written; `most` is the number of its tokens.
  async write(path, body, most, signal) {
    this.most = most;
    this.say("Waiting for the first token.");
    const aside = (comment) => this.say(`Reading: ${comment}.`);
    for await (const chunk of server.events(path, { body, signal, aside })) {
      if (chunk.error) throw new Refused(chunk.error.message);
      if (chunk.object === "mlxspec.round") this.add(chunk);
      const choice = chunk.choices?.[0];
      if (choice?.finish_reason) this.end(choice.finish_reason, chunk.timings);
    }
    if (!this.finish) throw new Refused("The stream ended before the text did.");
  }

  add(round) {
    const now = performance.now();
    if (!this.firstMs) [this.firstMs, this.firstCount] = [now, round.token_ids.length];
    this.others = Math.max(this.others, (seen.stats?.now.running ?? 1) - 1);
    this.rounds += 1;
    this.drafted += round.drafted;
    this.accepted += round.accepted;
    this.tokens.push(...round.token_ids);
    const stays = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    for (const piece of round.pieces) this.put(piece);
    if (stays) this.text.scrollTop = this.text.scrollHeight;
    const seconds = (now - this.firstMs) / 1000;
    if (seconds > 0.2) this.rate = (this.tokens.length - this.firstCount) / seconds;
    this.show();
    this.say("Writing.");
  }

  // Add a piece in its author's colour; line breaks and what indents a line have none.
  put({ by, text, reasoning }) {
    const into = reasoning ? this.thoughts() : this.text;
    for (const part of text.match(/[\n ]*\n *|[^\n]+?(?= *\n)|[^\n]+/g) ?? []) {
      const indent = this.length === 0 || this.isIndented ? part.match(/^[\n ]*/)[0] : part.includes("\n") ? part : "";
      this.append(into, "by-target", "target", indent);
      this.append(into, `by-${classOf(by)}`, by, part.slice(indent.length));
      this.isIndented = indent.length === part.length;
    }
  }

  // Where the reasoning stands, before the answer.
  thoughts() {
    const first = this.text.firstElementChild;
    if (first?.className === "thinks") return first;
    this.text.prepend(make("div", { class: "thinks" }));
    return this.text.firstElementChild;
  }

  append(into, name, title, text) {
    if (!text) return;
    const last = into.lastElementChild;
    if (last?.className === name) last.append(text);
    else into.append(make("span", { class: name, title }, text));
    this.length += text.length;
  }

  end(finish, timings) {
    this.finish = finish;
    if (timings?.predicted_per_second) this.rate = timings.predicted_per_second;
    this.show();
    const why = { stop: "It ended by itself.", length: "It reached its limit." };
    this.say(`${plural(this.tokens.length, "token")}. ${why[finish] ?? "It was ended."}`);
  }

  show() {
    const plain = seen.stats?.plain.tokens_per_second;
    if (this.rate) {
      this.speed.replaceChildren(speed(this.rate), make("small", {}, " tok/s"));
      const words = this.others
        ? `beside ${plural(this.others, "other text")}`
        : plain && !this.beside && `${(this.rate / plain).toFixed(2)} × plain, which is ${speed(plain)}`;
      if (words) this.speed.append(make("small", { class: "below" }, words));
    }
    this.kept.replaceChildren(this.drafted ? percent(this.accepted / this.drafted) : "–");
    this.each.replaceChildren(this.rounds ? (this.tokens.length / this.rounds).toFixed(1) : "–");
    this.bar.style.width = percent(this.finish ? 1 : Math.min(this.tokens.length / this.most, 1));
  }

  say(words, wrong = false) {
    if (this.said.textContent !== words) this.said.textContent = words;
    this.said.classList.toggle("wrong", wrong);
  }

  // Mark what stands at a place of the text, to the end of its word.
  mark(place) {
    const end = place + this.text.textContent.slice(place).match(/^.\S*/s)?.[0].length;
    const walker = document.createTreeWalker(this.text, NodeFilter.SHOW_TEXT);
    const found = [];
    let passed = 0;
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const [from, to] = [Math.max(place - passed, 0), Math.min(end - passed, node.data.length)];
      if (from < to) found.push([node, from, to]);
      passed += node.data.length;
    }
    for (const [node, from, to] of found) {
      const range = document.createRange();
      range.setStart(node, from);
      range.setEnd(node, to);
      range.surroundContents(make("mark"));
    }
  }
}

// --- what is asked -----------------------------------------------------------------------------

const PROPOSALS = { usual: "As usual here", auto: "Chosen by round", off: "None: plain" };

function named(value) {
  const words = { usual: "As usual here", auto: "Chosen round by round", off: "Plain" };
  return words[value] ?? `${plural(Number(value), "proposal")} a round`;
}

function fillProposals() {
  const fixed = [1, 2, 3, 4, 6, 8].map((k) => [String(k), `${k} a round`]);
  for (const select of document.querySelectorAll("[data-proposals]")) {
    for (const [value, words] of [...Object.entries(PROPOSALS), ...fixed]) select.append(make("option", { value }, words));
  }
  $("first").value = "off";
  $("second").value = "usual";
}

function bodyFor(proposals) {
  const speculative = { trace: true };
  if (proposals === "off") speculative.enabled = false;
  else if (proposals === "auto") speculative.draft_tokens = "auto";
  else if (proposals !== "usual") speculative.draft_tokens = Number(proposals);
  const body = {
    stream: true,
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    speculative,
  };
  const prompt = $("prompt").value;
  const isChat = $("kind").value === "chat" && seen.stats?.server.chats;
  if (isChat) {
    if ($("expected").value) body.prediction = { type: "content", content: $("expected").value };
    return ["/v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }];
  }
  return ["/v1/completions", { ...body, prompt }];
}

async function write(lane, proposals, signal) {
  const [path, body] = bodyFor(proposals);
  try {
    await lane.write(path, body, body.max_tokens, signal);
    return true;
  } catch (error) {
    if (error.name === "AbortError") lane.say("Stopped.");
    else if (error.status === 401) askForKey(true);
    else lane.say(error instanceof Refused ? error.message : "The server does not answer.", true);
    return false;
  }
}

async function race(signal) {
  const settings = [$("first").value, $("second").value];
  const empty = ["It begins.", "It begins once the first has ended, so that neither slows the other."];
  const lanes = ["lane-first", "lane-second"].map(
    (id, index) => new Lane($(id), { title: named(settings[index]), empty: empty[index], beside: true }),
  );
  judge("", "");
  for (const [index, lane] of lanes.entries()) {
    if (!(await write(lane, settings[index], signal))) return;
  }
  compare(lanes, settings);
}

// How many items two lists, or texts, begin with in common.
function common(one, other) {
  let place = 0;
  while (place < one.length && one[place] === other[place]) place += 1;
  return place;
}

function compare([first, second], settings) {
  const length = Math.max(first.tokens.length, second.tokens.length);
  const place = common(first.tokens, second.tokens);
  const faster = second.rate >= first.rate ? [1, second, first] : [0, first, second];
  const by = faster[2].rate ? faster[1].rate / faster[2].rate : 1;
  const who = `“${named(settings[faster[0]])}” was ${by.toFixed(2)} times as fast.`;
  if (place === length) {
    judge("same", `Same tokens: all ${count(length)}`, who);
    return;
  }
  const letters = common(first.text.textContent, second.text.textContent);
  first.mark(letters);
  second.mark(letters);
  const sampled = Number($("temperature").value) > 0;
  const why = sampled
    ? "Sampled with a fixed number of proposals, texts are as likely as without any, but a seed writes another one. Chosen round by round, it writes the same."
    : "At temperature 0 this happens where two tokens are as likely as each other, within rounding.";
  judge("differs", `First difference: token ${count(place + 1)} of ${count(length)}`, `${who} ${why}`);
}

function judge(kind, words, more = "") {
  $("verdict").className = `verdict ${kind}`;
  $("verdict").replaceChildren(words, ...(more ? [make("small", {}, more)] : []));
}

async function go(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  $("go").disabled = true;
  $("stop").hidden = false;
  if (mode === "race") await race(running.signal);
  else await write(new Lane($("lane")), $("proposals").value, running.signal);
  running = null;
  $("go").disabled = false;
  if (document.activeElement === $("stop")) $("go").focus();
  $("stop").hidden = true;
  await look();
}

function choose(next) {
  mode = next;
  for (const one of ["write", "race"]) {
    const chosen = one === next;
    $(one).hidden = !chosen;
    $(`tab-${one}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${one}`).tabIndex = chosen ? 0 : -1;
  }
  for (const option of document.querySelectorAll("[data-only]")) option.hidden = option.dataset.only !== next;
  $("go").textContent = next === "race" ? "Race" : "Write";
}
