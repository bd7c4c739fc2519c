// Calls of the gateway, as any client of OpenAI's API makes them; a key, where it wants one.

const KEY = "cleave-key"; // of sessionStorage: gone with the tab

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the gateway answered ${status}`);
    this.status = status;
    this.step = error?.step ?? null;
  }
}

/** The JSON at a path. Throws ApiError, TypeError when nobody answers. */
export async function get(path) {
  return (await call(path, {})).json();
}

/** The chunks of a streamed answer, as objects. Throws ApiError also for an error within the stream. */
export async function* stream(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error);
    yield chunk;
  }
  throw new ApiError(response.status, { message: "the connection ended before the answer did" });
}

async function call(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const authorization = key ? { Authorization: `Bearer ${key}` } : {};
    const response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization } });
    if (response.ok) return response;
    if (response.status !== 401) throw new ApiError(response.status, await reason(response));
    await askForKey(key);
  }
}

async function reason(response) {
  try {
    return (await response.json()).error;
  } catch {
    return null;
  }
}

/** The data of server-sent events: what follows "data: ", event by event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      yield* parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let asking = null;

/** Ask once, however many calls wait for it; `refused` is the key that was wrong. */
function askForKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return Promise.resolve(); // another call has asked meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key");
    const value = document.getElementById("key-value");
    value.value = "";
    document.getElementById("key-refused").hidden = refused === null;
    dialog.addEventListener("close", () => {
      if (value.value) sessionStorage.setItem(KEY, value.value.trim());
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
