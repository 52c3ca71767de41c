// How the page talks to the server: its public routes, with a key where one is asked for.

const KEPT = "mlxspec-key"; // in sessionStorage: of this tab, and gone with it

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const server = {
  get key() {
    return sessionStorage.getItem(KEPT);
  },

  set key(key) {
    if (key) sessionStorage.setItem(KEPT, key);
    else sessionStorage.removeItem(KEPT);
  },

  // The answer to a request; throws Refused where it is an error, in the server's words.
  async ask(path, { body, signal } = {}) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
    if (!response.ok) throw new Refused(await inWords(response), response.status);
    return response;
  },

  async json(path) {
    return (await this.ask(path)).json();
  },

  // The objects of a stream of server-sent events; comments are given to `aside`.
  async *events(path, { body, signal, aside = () => {} } = {}) {
    const response = await this.ask(path, { body, signal });
    for await (const line of linesOf(response.body)) {
      if (line.startsWith(": ")) aside(line.slice(2));
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      yield JSON.parse(line.slice(6));
    }
  },
};

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let begun = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (begun + value).split("\n");
      begun = lines.pop();
      yield* lines;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function inWords(response) {
  try {
    const answer = await response.json();
    return answer.error?.message ?? answer.reason ?? `The server answered ${response.status}.`;
  } catch {
    return `The server answered ${response.status}.`;
  }
}
