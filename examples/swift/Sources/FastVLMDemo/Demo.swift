import CoreML
import Foundation
import Tokenizers

@main
struct Demo {
    static let choices: [String: MLComputeUnits] = [
        "all": .all, "cpu-and-ne": .cpuAndNeuralEngine, "cpu-and-gpu": .cpuAndGPU,
        "cpu-only": .cpuOnly,
    ]

    static func main() async {
        let arguments = CommandLine.arguments
        guard arguments.count >= 4, let units = choices[arguments.count > 4 ? arguments[4] : "all"]
        else {
            print("Usage: FastVLMDemo BUNDLE IMAGE QUESTION [all|cpu-and-ne|cpu-and-gpu|cpu-only]")
            exit(2)
        }
        do {
            let folder = URL(fileURLWithPath: arguments[1], isDirectory: true)
            let image = URL(fileURLWithPath: arguments[2])
            try await run(folder: folder, image: image, question: arguments[3], units: units)
        } catch {
            print("Error: \(error.localizedDescription)")
            exit(1)
        }
    }

    static func run(folder: URL, image: URL, question: String, units: MLComputeUnits) async throws {
        var loading = Stopwatch()
        let manifest = try Manifest(folder: folder)
        let tokenizer = try await AutoTokenizer.from(modelFolder: folder)
        let model = try await FastVLM(folder: folder, manifest: manifest, units: units)
        loading.lap("load")

        // The image's features take the place between the two texts.
        let before = tokenizer.encode(
            text: "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
            addSpecialTokens: false)
        let after = tokenizer.encode(
            text: "\n\(question)<|im_end|>\n<|im_start|>assistant\n", addSpecialTokens: false)
        let count = before.count + manifest.imageTokens + after.count

        var watch = Stopwatch()
        let pixels = manifest.preprocessing.pixels(of: try RGBAImage(contentsOf: image))
        watch.lap("preprocess")
        let features = try model.encode(pixels: pixels)
        watch.lap("encode")
        let prompt = try model.embed(before) + features + model.embed(after)
        var token = argmax(try model.logits(of: prompt, count: count))
        watch.lap("prefill")
        var shown = show(tokenizer.decode(tokens: [token], skipSpecialTokens: true), after: "")
        watch.lap("first token")

        let ttft = watch.total
        var tokens: [Int] = []
        while !manifest.eosTokenIDs.contains(token), count + tokens.count < manifest.context {
            tokens.append(token)
            shown = show(tokenizer.decode(tokens: tokens, skipSpecialTokens: true), after: shown)
            token = argmax(try model.logits(of: model.embed([token]), count: 1))
        }
        let rate = Double(tokens.count) / max(watch.total - ttft, .ulpOfOne)
        print("\n\n\((loading.laps + watch.laps).joined(separator: ", "))")
        print(String(format: "TTFT %.0f ms, then %.1f tokens/s", 1000 * ttft, rate))
    }

    /// Prints what is new of the text, unless it ends within a character; returns what is printed.
    static func show(_ text: String, after shown: String) -> String {
        guard !text.hasSuffix("\u{FFFD}"), text.hasPrefix(shown) else { return shown }
        print(text.dropFirst(shown.count), terminator: "")
        fflush(stdout)
        return text
    }

    static func argmax(_ values: [Float]) -> Int {
        var best = 0
        for index in values.indices where values[index] > values[best] { best = index }
        return best
    }
}

/// Times one step after the other.
struct Stopwatch {
    private let start = ProcessInfo.processInfo.systemUptime
    private var last = ProcessInfo.processInfo.systemUptime
    private(set) var laps: [String] = []

    var total: Double { ProcessInfo.processInfo.systemUptime - start }

    mutating func lap(_ name: String) {
        let now = ProcessInfo.processInfo.systemUptime
        laps.append(name + String(format: " %.1f ms", 1000 * (now - last)))
        last = now
    }
}
