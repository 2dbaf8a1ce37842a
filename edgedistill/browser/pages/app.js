// The bundle's page: load on a click (or at once, when this browser kept the model), then answer.
import { isKept, openStudent, readConfig, text } from './student.js';

const $ = (id) => document.getElementById(id);
let student = null;
let running = null;

function complain(error) {
  $('error').textContent = location.protocol === 'file:'
    ? 'A page opened as a file may not read the model. In this folder run: python -m http.server'
    : text(error);
  $('error').hidden = false;
}

function showProgress(share) {
  $('progress').hidden = false;
  if (share === null) {
    $('progress').removeAttribute('value');
    $('status').textContent = 'Preparing the model …';
  } else {
    $('progress').value = share;
    $('status').textContent = `Loading the model: ${Math.floor(share * 100)} %`;
  }
}

async function load() {
  $('load').disabled = true;
  $('error').hidden = true;
  try {
    student = await openStudent(await readConfig(), { onProgress: showProgress });
    $('loading').hidden = true;
    $('ask').disabled = false;
    $('stats').textContent = 'Ready.';
    $('prompt').focus();
  } catch (error) {
    $('load').disabled = false;
    $('progress').hidden = true;
    $('status').textContent = 'Not loaded.';
    complain(error);
  }
}

async function answer() {
  if (!student || running || !$('prompt').value.trim()) return;
  running = new AbortController();
  $('ask').disabled = true;
  $('stop').hidden = false;
  $('error').hidden = true;
  $('answer').textContent = '';
  $('answer').setAttribute('aria-busy', 'true');
  $('stats').textContent = 'Reading the prompt …';
  try {
    const made = await student.answer($('prompt').value, {
      signal: running.signal,
      onText: (soFar, tokens) => {
        $('answer').textContent = soFar;
        $('stats').textContent = `${tokens} tokens …`;
      },
    });
    $('answer').textContent = made.text.trim();
    $('stats').textContent = told(made);
  } catch (error) {
    $('stats').textContent = '';
    complain(error);
  } finally {
    running = null;
    $('answer').setAttribute('aria-busy', 'false');
    $('stop').hidden = true;
    $('ask').disabled = false;
  }
}

function told(made) {
  // The first token comes with the prompt; the stop token costs a step too.
  const steps = made.ids.length - (made.stopped ? 0 : 1);
  const rate = steps > 0 && made.decode_seconds > 0 ? `, ${(steps / made.decode_seconds).toFixed(1)} tokens/s` : '';
  return `${made.ids.length} tokens${rate}, first token after ${made.time_to_first_token.toFixed(2)} s`;
}

$('load').addEventListener('click', load);
$('stop').addEventListener('click', () => running?.abort());
$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  answer();
});
$('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    answer();
  }
});
readConfig().then(isKept).then((kept) => { if (kept) load(); }).catch(complain);
