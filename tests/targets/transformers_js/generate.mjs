// Runs a bundle in Transformers.js, unchanged and offline, and prints what came out as JSON.
// node generate.mjs FOLDER MAX_NEW_TOKENS QUESTION IMAGE...
import path from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers";

const [folder, maxNewTokens, question, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + path.sep;
const name = path.basename(folder);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name);

const content = [{ type: "image" }, { type: "text", text: question }];
const prompt = processor.apply_chat_template([{ role: "user", content }], {
  add_generation_prompt: true,
});
const answers = [];
for (const file of images) {
  const inputs = await processor(await RawImage.read(file), prompt, { add_special_tokens: false });
  const given = inputs.input_ids.dims.at(-1);
  const output = await model.generate({
    ...inputs,
    do_sample: false,
    max_new_tokens: Number(maxNewTokens),
  });
  const ids = output.tolist()[0].map(Number);
  answers.push({
    input_ids: ids.slice(0, given),
    new_ids: ids.slice(given),
    pixels: Array.from(inputs.pixel_values.data),
  });
}
console.log(JSON.stringify({ prompt, answers }));
