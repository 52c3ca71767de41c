// What is seen of the server: its state, its rounds, its rows, and what it has learned.

function state(kind, words) {
  if ($("state").textContent !== words) $("state").textContent = words;
  $("state").dataset.state = kind;
}

// Look at the server once: show its counts, or why there are none.
async function look() {
  let stats;
  try {
    stats = await server.json("/stats");
  } catch (error) {
    if (error.status === 401) askForKey(Boolean(server.key));
    else state("bad", error instanceof Refused ? error.message : "no answer; trying again");
    return;
  }
  showStats(stats);
}

function showStats(stats) {
  const first = !seen.stats;
  seen.stats = stats;
  const { now, server: about } = stats;
  state(now.ready ? "ready" : "waits", now.ready ? "ready" : now.reason);
  const draft = about.draft ?? (about.from_text ? "what the text repeats" : null);
  $("model").textContent = [about.model, about.target !== about.model && about.target, draft && `draft: ${[draft].flat().join(", ")}`].filter(Boolean).join(" · ");
  $("forget").hidden = !server.key;
  for (const one of document.querySelectorAll("[data-chats]")) one.hidden = !about.chats;
  document.title = `${about.model} · mlxspec`;
  if (first && !$("prompt").value) $("prompt").value = about.chats ? "Write a haiku about the sea." : "def fibonacci(n):\n";
  if (first && about.max_tokens) $("tokens").max = about.max_tokens;
  $("doing").textContent = sentence(stats.controller.doing);
  const why = stats.controller.parked ?? stats.controller.choices.find(({ parked }) => parked)?.parked;
  $("why").textContent = sentence(why ?? "");
  $("why").hidden = !why;
  drawPositions($("positions"), stats.speculation.drafted_by_position, stats.speculation.accepted_by_position);
  showQueue();
  showCurve();
  showTotals(stats);
}

const sentence = (words) => words && `${words[0].toUpperCase()}${words.slice(1)}.`;

function showTotals({ requests, tokens, speculation, cache, now, plain }) {
  const { stop = 0, length = 0 } = requests.ended;
  const rows = [
    ["Texts written", count(stop + length)],
    ["Texts cancelled", count(requests.cancelled)],
    ["Requests with errors", count(requests.errors)],
    ["Tokens written", count(tokens.written)],
    ["Proposals kept", speculation.acceptance_rate === null ? "–" : percent(speculation.acceptance_rate)],
    ["All texts, at this moment", `${speed(now.tokens_per_second)} tok/s`],
    ["One text, plain", plain.tokens_per_second ? `${speed(plain.tokens_per_second)} tok/s` : "–"],
  ];
  if (cache?.tokens) rows.push(["Prompts from the cache", percent(cache.hit_tokens / cache.tokens)]);
  $("totals").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

// --- rows and queue ----------------------------------------------------------------------------

function showQueue() {
  const { running: written, waiting } = seen.stats.now;
  const most = seen.stats.server.max_rows;
  const queue = waiting ? `, ${count(waiting)} waiting` : "";
  $("queue").textContent = written || waiting ? `${count(written)} running${queue}` : "Nothing runs";
  const slots = Array.from({ length: most }, (_, index) => make("i", { class: index < written ? "taken" : "" }));
  $("slots").replaceChildren(...slots);
  $("slots").setAttribute("aria-label", `${written} of ${most} rows are taken.`);
  if (!written && !waiting) seen.rows.clear();
  const rows = [...seen.rows.values()].slice(0, 12);
  $("rows").replaceChildren(
    ...rows.map(({ path, row, tokens, reads }) =>
      make("li", {}, make("span", {}, `${path.replace("/v1/", "")} · row ${row}`), make("span", {}, reads ?? plural(tokens, "token")))),
  );
}

function happened(one) {
  if (one.type === "lost") {
    seen.lost += one.count;
    $("lost").textContent = `${plural(seen.lost, "event")} came too fast to be shown.`;
    return;
  }
  const id = `${one.request}/${one.row}`;
  if (one.type === "end") seen.rows.delete(id);
  else if (one.row !== null) {
    const row = seen.rows.get(id) ?? { path: one.path, row: one.row, tokens: 0 };
    row.reads = one.type === "read" ? `reading ${count(one.read)} of ${count(one.total)}` : undefined;
    row.tokens += one.tokens ?? 0;
    seen.rows.set(id, row);
  }
  if (one.type === "round") {
    seen.rounds = [...seen.rounds, one].slice(-ROUNDS);
    if (seen.stats) seen.stats.now.running = one.running;
    const who = { draft: "the draft", history: "the text so far", prediction: "the expected text" };
    const does = one.drafted ? `${who[classOf(one.source)]} proposes ${plural(one.drafted, "token")}` : "nothing is proposed";
    $("doing").textContent = sentence(does);
    if (one.drafted) $("why").hidden = true;
  }
}

let listening = null;

// Hear what happens, for ever.
async function listen() {
  for (;;) {
    try {
      if (!$("ask").open) {
        listening = new AbortController();
        for await (const one of server.events("/events", { signal: listening.signal })) {
          happened(one);
          draw();
        }
      }
    } catch {
      // `look` says that nobody answers, or asks for a key
    }
    seen.rows.clear();
    await sleep(1000);
  }
}

let isDue = false;

function draw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    drawRounds($("rounds"), seen.rounds, classOf);
    if (seen.stats) showQueue();
  });
}

// --- what rounds cost --------------------------------------------------------------------------

// The curves that can be drawn: what a controller learned, and what was timed with a fixed K.
function curves() {
  const found = seen.stats.learned
    .filter((one) => one.costs[0] && one.costs.length > 1)
    .map((one) => ({
      name: `${one.drafter === "model" ? "draft" : one.drafter}, ${plural(one.rows, "row")}`,
      costs: one.costs.map((cost) => cost && cost / one.costs[0]),
      brings: one.acceptance.length ? expected(one.acceptance, one.costs.length - 1) : [],
      plain: one.costs[0],
    }));
  const { measured } = seen.stats;
  if (measured?.rounds.length) {
    const costs = measured.rounds.map(({ draft, verify }) => (draft + verify) / measured.plain);
    found.push({ name: "timed at the start", costs: [1, ...costs], brings: [], plain: measured.plain });
  }
  const timed = new Map();
  for (const { rows, draft_tokens: k, seconds } of seen.stats.rounds) {
    if (seconds) timed.set(rows, (timed.get(rows) ?? new Map()).set(k, seconds));
  }
  for (const [rows, times] of timed) {
    const plain = times.get(0) ?? (rows === 1 ? seen.stats.plain.seconds : null);
    if (!plain || Math.max(...times.keys()) < 1) continue;
    const costs = Array.from({ length: Math.max(...times.keys()) + 1 }, (_, k) => (k ? times.get(k) / plain || null : 1));
    found.push({ name: `timed, ${plural(rows, "row")}`, costs, brings: [], plain });
  }
  const unique = new Map(found.map((one) => [one.name, one]));
  return [...unique.values()];
}

// Tokens that a round of 0, 1, 2 … proposals brings on average.
function expected(acceptance, most) {
  const brings = [1];
  let run = 1;
  for (const rate of acceptance.slice(0, most)) brings.push(brings.at(-1) + (run *= rate));
  return brings;
}

function showCurve() {
  const found = curves();
  const select = $("curve-of");
  const names = found.map((one) => one.name);
  if ([...select.options].map((one) => one.value).join() !== names.join()) {
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(seen.curve)) select.value = seen.curve;
  }
  select.hidden = found.length < 2;
  const one = found.find(({ name }) => name === select.value) ?? found[0];
  if (!one) {
    $("curve").replaceChildren();
    $("curve-note").textContent = "Nothing was timed yet. It shows once a text with proposals has ended.";
    return;
  }
  drawCurve($("curve"), one.costs, one.brings);
  const ms = (1000 * one.plain).toPrecision(3);
  const lines = one.brings.length ? "Tokens that a round brings, and its time in plain rounds" : "Time in plain rounds";
  $("curve-note").textContent = `${lines}, by the number of proposals. A plain round takes ${ms} ms here.${verdictOn(one)}`;
}

// Which number of proposals pays, in words.
function verdictOn({ costs, brings }) {
  const places = costs.map((cost, k) => [k, cost]).filter(([k, cost]) => cost !== null && k < brings.length);
  if (places.length < 2) return "";
  const best = bestOf(places, brings);
  const [k, cost] = places.find(([place]) => place === (best || places[1][0]));
  const does = `${plural(k, "proposal")}: ${brings[k].toFixed(1)} tokens in the time of ${cost.toFixed(1)} plain rounds`;
  return best ? ` Best are ${does}.` : ` None pays: ${does}.`;
}

// --- the key -----------------------------------------------------------------------------------

// Ask for the key until one is given; `wrong` says that the one in use is not known.
function askForKey(wrong) {
  if ($("ask").open) return;
  server.key = null;
  state("waits", "asks for a key");
  $("ask-wrong").hidden = !wrong;
  $("key").value = "";
  $("ask").showModal();
}

// --- the beginning -----------------------------------------------------------------------------

function begin() {
  fillProposals();
  new Lane($("lane"), { empty: "The text arrives here, in the colours of those who wrote it." });
  for (const id of ["lane-first", "lane-second"]) new Lane($(id), { empty: "Two settings write on one prompt, one after the other." });
  drawRounds($("rounds"), [], classOf);
  drawPositions($("positions"), [], []);
  $("form").addEventListener("submit", go);
  $("stop").addEventListener("click", () => running?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  for (const one of ["write", "race"]) $(`tab-${one}`).addEventListener("click", () => choose(one));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    choose(mode === "race" ? "write" : "race");
    $(`tab-${mode}`).focus();
  });
  $("curve-of").addEventListener("change", () => {
    seen.curve = $("curve-of").value;
    showCurve();
  });
  $("ask").addEventListener("cancel", (event) => event.preventDefault());
  $("ask-form").addEventListener("submit", () => {
    server.key = $("key").value.trim();
    look();
  });
  $("forget").addEventListener("click", () => askForKey(false));
  if (document.documentElement.dataset.key === "needed" && !server.key) askForKey(false);
  // A browser keeps pages that were left, with their connections, of which it has few.
  addEventListener("pagehide", () => {
    listening?.abort();
    running?.abort();
  });
  repeat();
  listen();
}

async function repeat() {
  for (;;) {
    if (!document.hidden && !$("ask").open) await look();
    await sleep(EVERY_MS);
  }
}

begin();
