// node-llama-cpp, whose module is the argument: loads the model of gguf_llama.py as common.py says that programs do.
import {createHash} from "node:crypto";
import {readFileSync, statSync} from "node:fs";
import {createInterface} from "node:readline";

const {getLlama} = await import(process.argv[2]);
const TOKENS = 8;

function kib(file, wanted) {
    let total = 0, inside = true;
    for (const line of readFileSync(file, "utf8").split("\n")) {
        const words = line.trim().split(/\s+/);
        if (!words[0].endsWith(":"))
            inside = wanted.directory === undefined || (words[5] ?? "").startsWith(`${wanted.directory}/`);
        else if (inside && wanted.fields[words[0]] !== undefined)
            total += wanted.fields[words[0]] * Number(words[1]);
    }
    return total;
}

const anonymous = () => kib("/proc/self/smaps_rollup", {fields: {"Anonymous:": 1}});
const tell = (answer) => process.stdout.write(`${JSON.stringify(answer)}\n`);

const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const lines = createInterface({input: process.stdin})[Symbol.asyncIterator]();
process.stdout.write("ready\n");
const directory = (await lines.next()).value;
const before = anonymous(), begun = performance.now();
const model = await llama.loadModel({modelPath: `${directory}/llama.gguf`, useMmap: true, gpuLayers: 0});
const context = await model.createContext({contextSize: 64, threads: 1});
const tokens = [];
for await (const token of context.getSequence().evaluate([1, 300, 301], {temperature: 0})) {
    tokens.push(token);
    if (tokens.length === TOKENS)
        break;
}
tell({
    load_s: (performance.now() - begun) / 1000,
    digest: createHash("sha256").update(JSON.stringify(tokens)).digest("hex").slice(0, 8),
    size: statSync(`${directory}/llama.gguf`).size,
});
await lines.next();
const fields = {"Rss:": 1, "Anonymous:": -1};
tell({
    mapped: kib("/proc/self/smaps", {directory, fields}) * 1024,
    copied: (anonymous() - before) * 1024,
});
await lines.next();
process.exit();
