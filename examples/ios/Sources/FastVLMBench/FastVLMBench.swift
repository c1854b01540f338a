import ExecuTorchLLM
import Foundation

/// Asks a bundle's program its question, over and over, as `fastvlm-export bench --kit` wrote it.
///
/// The stock runner prints a line `PyTorchObserver {...}` after each run that is not a warm-up:
/// that output, saved to a file, is what `fastvlm-export bench --stats` reads.
public enum FastVLMBench {
    public static func run(kit: URL) throws {
        let question = try Question(folder: kit)
        let pixels = try Data(contentsOf: kit.appendingPathComponent("pixels.f32"))
        let side = question.resolution
        guard pixels.count == 3 * side * side * MemoryLayout<Float>.size else {
            throw KitError("pixels.f32 holds \(pixels.count) bytes: no RGB image of \(side) pixels")
        }
        let runner = MultimodalRunner(
            modelPath: kit.appendingPathComponent("model.pte").path,
            tokenizerPath: kit.appendingPathComponent("tokenizer.json").path
        )
        let inputs = [
            MultimodalInput(question.before),
            MultimodalInput(Image(float: pixels, width: side, height: side, channels: 3)),
            MultimodalInput(question.after),
        ]
        // No load() before: only the load within the first generate is timed by the runner.
        for number in 0..<(question.warmup + question.runs) {
            runner.reset()
            let config = Config {
                $0.temperature = 0
                $0.maximumNewTokens = question.maximumNewTokens
                $0.isWarming = number < question.warmup
            }
            try runner.generate(inputs, config) { _ in }
        }
    }
}

/// What `question.json` says. The image stands between the two texts.
struct Question: Decodable {
    let before: String
    let after: String
    let resolution: Int
    let maximumNewTokens: Int
    let warmup: Int
    let runs: Int

    init(folder: URL) throws {
        let data = try Data(contentsOf: folder.appendingPathComponent("question.json"))
        self = try JSONDecoder().decode(Question.self, from: data)
    }
}

/// Something about the kit that the user can mend.
struct KitError: LocalizedError {
    let errorDescription: String?

    init(_ message: String) {
        errorDescription = message
    }
}
