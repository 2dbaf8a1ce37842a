// Does what the measuring program asks for, one job at a time, with the very code of the bundle.
import { openStudent, readConfig, text } from './web/student.js';

const WORK = {
  render: (student, { prompt }) => student.render(prompt),
  tokenize: (student, { text: rendered }) => student.tokenize(rendered),
  generate: (student, { ids, max_tokens: most, stop_ids: stop }) => student.generate(ids, most, stop),
  logits: (student, { ids, first }) => student.predictions(ids, first),
};

function send(what, body) {
  return fetch(what, { method: 'POST', body });
}

function failed(error) {
  // Nobody there to tell: the program that started this browser was killed, so it ends, too.
  return send('failed', text(error)).catch(() => close());
}

async function main() {
  const started = performance.now();
  const student = await openStudent(await readConfig(), { keep: false });
  const seconds = (performance.now() - started) / 1000;
  await send('done', JSON.stringify({ ...student.facts(), load_seconds: seconds }));
  for (;;) {
    const job = await fetch('job', { cache: 'no-store' });
    if (job.status === 204) continue; // nothing to do yet
    const { do: verb, ...given } = await job.json();
    const made = await WORK[verb](student, given);
    await send('done', made instanceof Float32Array ? made : JSON.stringify(made));
  }
}

addEventListener('error', (event) => failed(event.error ?? event.message));
addEventListener('unhandledrejection', (event) => failed(event.reason));
main().catch(failed);
