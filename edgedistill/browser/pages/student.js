// The shipped student in this browser, by wllama (llama.cpp in WebAssembly, one thread): the prompt
// as it was trained and measured, greedy decoding, nothing else. Used by app.js, and by the page
// that measures it.
import { Wllama } from './wllama/index.min.js';

const CACHE = 'edgedistill';
// Greedy: the most likely token of the raw logits, every other sampler off.
const GREEDY = {
  temp: 0, top_k: 1, top_p: 1, min_p: 0, typ_p: 1, penalty_last_n: 0, penalty_repeat: 1,
  penalty_freq: 0, penalty_present: 0, mirostat: 0,
};
const NEVER = -104; // log of what is below the smallest float32

export async function readConfig() {
  const answer = await fetch(new URL('student.json', import.meta.url), { cache: 'no-cache' });
  if (!answer.ok) throw new Error(`student.json cannot be read (${answer.status})`);
  return answer.json();
}

/** Whether the model file is kept in this browser from an earlier visit. */
export async function isKept(config) {
  const store = await openStore();
  return Boolean(store && (await store.match(modelUrl(config))));
}

/** Fetch and load the model. `onProgress` is given 0..1 while it is fetched, then null. */
export async function openStudent(config, { onProgress = () => {}, keep = true } = {}) {
  const file = await fetchModel(config, onProgress, keep);
  onProgress(null);
  const student = new Student(config);
  await student.load(file);
  return student;
}

class Student {
  constructor(config) {
    this.config = config;
    this.broken = new Promise((_, reject) => { this.fail = reject; });
    this.broken.catch(() => {});
    const quiet = () => {};
    // wllama only logs what kills its worker, and then waits for it for ever.
    const error = (...said) => {
      const event = said.find((item) => typeof ErrorEvent !== 'undefined' && item instanceof ErrorEvent);
      if (event) this.fail(new Error(event.message || 'the WebAssembly worker died'));
      else this.last = said.join(' ');
    };
    const paths = { 'single-thread/wllama.wasm': new URL('wllama/wllama.wasm', import.meta.url).href };
    this.wllama = new Wllama(paths, { logger: { debug: quiet, log: quiet, warn: quiet, error } });
  }

  async load(file) {
    const options = { n_ctx: this.config.context_tokens, n_threads: 1, seed: 1 };
    try {
      await this.live(this.wllama.loadModel([file], options));
    } catch (error) {
      throw new Error(`the model cannot be loaded: ${text(error)}${this.last ? ` (${this.last})` : ''}`);
    }
    await this.live(this.wllama.samplingInit(GREEDY));
  }

  facts() {
    const info = this.wllama.getLoadedContextInfo();
    return {
      n_vocab: info.n_vocab,
      n_ctx: info.n_ctx,
      threads: this.wllama.getNumThreads(),
      llama_cpp: Wllama.getLibllamaVersion(),
      user_agent: navigator.userAgent,
    };
  }

  /** The text the student is given, with the user's words in their place. */
  render(prompt) {
    return this.config.parts.join(this.config.trim ? prompt.trim() : prompt);
  }

  /** Token IDs of that text. */
  async tokenize(rendered) {
    const ids = [...(await this.live(this.wllama.tokenize(rendered, true)))];
    const bos = this.config.bos;
    return bos === null || ids[0] === bos ? ids : [bos, ...ids];
  }

  /** Greedy answer; `onText` is given the text so far. Times in seconds, without tokenization. */
  async generate(ids, maxTokens, stopIds, { onText = () => {}, signal = null } = {}) {
    const stop = new Set(stopIds);
    const bytes = new TextDecoder();
    const made = [];
    let answer = '';
    await this.live(this.wllama.kvClear());
    const started = performance.now();
    await this.live(this.wllama.decode(ids, {}));
    let next = await this.live(this.wllama.samplingSample());
    const first = performance.now();
    while (!stop.has(next.token) && !signal?.aborted) {
      made.push(next.token);
      answer += bytes.decode(next.piece, { stream: true });
      onText(answer, made.length, (performance.now() - first) / 1000);
      if (made.length >= maxTokens) break;
      await this.live(this.wllama.decode([next.token], {}));
      next = await this.live(this.wllama.samplingSample());
    }
    const ended = performance.now();
    return {
      ids: made,
      text: answer + bytes.decode(),
      stopped: stop.has(next.token),
      time_to_first_token: (first - started) / 1000,
      total_seconds: (ended - started) / 1000,
      decode_seconds: (ended - first) / 1000,
    };
  }

  /** Rows [ids.length - first, n_vocab] of float32: row j holds the log-probabilities that predict
   *  ids[first + j]. */
  async predictions(ids, first) {
    const width = this.facts().n_vocab;
    const rows = new Float32Array((ids.length - first) * width);
    await this.live(this.wllama.kvClear());
    await this.live(this.wllama.decode(ids.slice(0, first), {}));
    for (let j = 0; j < ids.length - first; j++) {
      if (j) await this.live(this.wllama.decode([ids[first + j - 1]], {}));
      for (const { token, p } of await this.live(this.wllama.getLogits(-1))) {
        rows[j * width + token] = p === 0 ? NEVER : Math.log(p);
      }
    }
    return rows;
  }

  /** The shipped prompt and its limits: what a visitor of the page gets. */
  async answer(prompt, options) {
    const ids = await this.tokenize(this.render(prompt));
    const room = this.facts().n_ctx - ids.length;
    if (room < 1) throw new Error(`the prompt has ${ids.length} tokens; there is room for ${this.facts().n_ctx}`);
    return this.generate(ids, Math.min(this.config.max_tokens, room), this.config.stop, options);
  }

  live(work) {
    return Promise.race([work, this.broken]);
  }
}

function modelUrl(config) {
  const url = new URL(`../${encodeURIComponent(config.model)}`, import.meta.url);
  url.searchParams.set('sha256', config.sha256); // another model never comes from a cache
  return url.href;
}

async function openStore() {
  try {
    return await caches.open(CACHE); // absent where a page is neither https nor localhost
  } catch {
    return null;
  }
}

async function fetchModel(config, onProgress, keep) {
  const url = modelUrl(config);
  const store = keep ? await openStore() : null;
  const kept = store && (await store.match(url));
  const file = await read(kept || (await fetch(url)), config, onProgress);
  if (store && !kept) await keepOnly(store, url, file);
  return file;
}

async function read(answer, config, onProgress) {
  if (!answer.ok) throw new Error(`${config.model} cannot be fetched (${answer.status})`);
  const parts = [];
  let done = 0;
  for (const reader = answer.body.getReader(); ;) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    parts.push(value);
    done += value.byteLength;
    onProgress(done / config.bytes);
  }
  if (done !== config.bytes) {
    throw new Error(`${config.model} has ${done} bytes here, the bundle's has ${config.bytes}`);
  }
  return new Blob(parts);
}

/** The file in its store, and no older one of this page: other pages of the site keep theirs. */
async function keepOnly(store, url, file) {
  const own = new URL('.', url).href;
  try {
    for (const { url: held } of await store.keys()) {
      if (new URL('.', held).href === own) await store.delete(held);
    }
    await store.put(url, new Response(file));
  } catch {
    // No room for it: it is fetched again next time.
  }
}

export function text(error) {
  return error?.message ?? String(error);
}
