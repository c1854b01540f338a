import Foundation

/// What the demo reads of a bundle's `manifest.json`.
struct Manifest: Decodable {
    let schema: Int
    let target: String
    let context: Int
    let imageTokens: Int
    let promptTemplate: String
    let eosTokenIDs: [Int]
    let preprocessing: Preprocessing
    let artifact: Artifact

    enum CodingKeys: String, CodingKey {
        case schema, target, context, preprocessing, artifact
        case imageTokens = "image_tokens"
        case promptTemplate = "prompt_template"
        case eosTokenIDs = "eos_token_ids"
    }

    /// Reads the manifest of the bundle in `folder`, and makes sure that this demo understands it.
    init(folder: URL) throws {
        let data = try Data(contentsOf: folder.appendingPathComponent("manifest.json"))
        self = try JSONDecoder().decode(Manifest.self, from: data)
        guard schema == 3, target == "coreml", artifact.layout == "fastvlm",
            promptTemplate == "qwen_2", preprocessing.resampling == "bicubic"
        else {
            throw DemoError("\(folder.path) is not a bundle of `--target coreml` for this demo.")
        }
    }
}

/// What is particular to the Core ML packages.
struct Artifact: Decodable {
    let layout: String
    let prefillChunk: Int

    enum CodingKeys: String, CodingKey {
        case layout
        case prefillChunk = "prefill_chunk"
    }
}

/// An error that is shown as its message.
struct DemoError: LocalizedError {
    let errorDescription: String?

    init(_ message: String) {
        errorDescription = message
    }
}
