// What transformers.js makes of an exported folder. JSON on stdin: {modules, folder, dtype, texts,
// talks, max_tokens}; JSON on stdout: {ids, rendered, prompts, answers}.
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";
import { readFileSync } from "node:fs";

const asked = JSON.parse(readFileSync(0, "utf-8"));
const found = createRequire(join(asked.modules, "x.js")).resolve("@huggingface/transformers");
const { env, AutoTokenizer, AutoModelForCausalLM } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = dirname(asked.folder) + "/";
const name = basename(asked.folder);

const tokenizer = await AutoTokenizer.from_pretrained(name);
const numbers = (tensor) => Array.from(tensor.data, Number);
const ids = asked.texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }));
const rendered = asked.talks.map((talk) =>
  tokenizer.apply_chat_template(talk, {
    tokenize: false,
    add_generation_prompt: talk[talk.length - 1].role === "user",
  }),
);
const prompts = [];
const answers = [];
if (asked.dtype) {
  const model = await AutoModelForCausalLM.from_pretrained(name, {
    dtype: asked.dtype,
    session_options: { intraOpNumThreads: 1 },
  });
  for (const talk of asked.talks) {
    if (talk[talk.length - 1].role !== "user") continue;
    const inputs = tokenizer.apply_chat_template(talk, {
      add_generation_prompt: true,
      return_dict: true,
    });
    const made = await model.generate({
      ...inputs,
      max_new_tokens: asked.max_tokens,
      do_sample: false,
    });
    const prompt = numbers(inputs.input_ids);
    prompts.push(prompt);
    answers.push(numbers(made).slice(prompt.length));
  }
}
process.stdout.write(JSON.stringify({ ids, rendered, prompts, answers }));
