import CoreML
import Foundation

/// A bundle's packages, loaded and run. Arrays are flat, in row-major order.
final class FastVLM {
    let manifest: Manifest
    private let vision: MLModel
    private let embedding: MLModel
    private let prefill: MLModel
    private let decode: MLModel
    private let state: MLState
    private var position = 0

    init(folder: URL, manifest: Manifest, units: MLComputeUnits) async throws {
        // Compiling is slow: an app keeps the compiled packages, or ships them.
        func compiled(_ package: String) async throws -> URL {
            try await MLModel.compileModel(at: folder.appendingPathComponent(package))
        }
        func load(_ url: URL, _ function: String? = nil) async throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            configuration.functionName = function
            return try await MLModel.load(contentsOf: url, configuration: configuration)
        }
        self.manifest = manifest
        vision = try await load(compiled("vision.mlpackage"))
        embedding = try await load(compiled("embedding.mlpackage"))
        let decoder = try await compiled("decoder.mlpackage")
        let prefill = try await load(decoder, "prefill")
        decode = try await load(decoder, "decode")
        state = prefill.makeState()
        self.prefill = prefill
    }

    /// Pixels [1,3,R,R] -> image features [1,N,D].
    func encode(pixels: [Float]) throws -> [Float] {
        let side = manifest.preprocessing.resolution
        let input = MLShapedArray<Float>(scalars: pixels, shape: [1, 3, side, side])
        let outputs = try vision.prediction(from: inputs(["pixel_values": MLMultiArray(input)]))
        return try output("image_features", of: outputs)
    }

    /// Token ids [1,S] -> embeddings [1,S,D].
    func embed(_ ids: [Int]) throws -> [Float] {
        let input = MLShapedArray<Int32>(scalars: ids.map { Int32($0) }, shape: [1, ids.count])
        let outputs = try embedding.prediction(from: inputs(["input_ids": MLMultiArray(input)]))
        return try output("inputs_embeds", of: outputs)
    }

    /// Embeddings [1,S,D] of the next positions -> logits [1,V] of the last one.
    ///
    /// A prompt goes through `prefill` in chunks of its fixed length: the last one is padded, and
    /// `length` says how many rows count. A single token goes through `decode`.
    func logits(of embeds: [Float], count: Int) throws -> [Float] {
        guard count > 0, position + count <= manifest.context else {
            throw DemoError("The context holds \(manifest.context) positions.")
        }
        let chunk = manifest.artifact.prefillChunk
        let width = embeds.count / count
        var logits: [Float] = []
        for start in stride(from: 0, to: count, by: chunk) {
            let length = min(chunk, count - start)
            let rows = length == 1 ? 1 : chunk
            var padded = Array(embeds[(start * width)..<((start + length) * width)])
            padded += [Float](repeating: 0, count: (rows - length) * width)
            var arrays = [
                "inputs_embeds": MLMultiArray(
                    MLShapedArray<Float>(scalars: padded, shape: [1, rows, width])),
                "position": scalar(position),
            ]
            if rows > 1 { arrays["length"] = scalar(length) }
            let model = rows > 1 ? prefill : decode
            let outputs = try model.prediction(from: inputs(arrays), using: state)
            logits = try output("logits", of: outputs)
            position += length
        }
        return logits
    }

    private func scalar(_ value: Int) -> MLMultiArray {
        MLMultiArray(MLShapedArray<Int32>(scalars: [Int32(value)], shape: [1]))
    }

    private func inputs(_ arrays: [String: MLMultiArray]) throws -> MLDictionaryFeatureProvider {
        let features = arrays.mapValues { MLFeatureValue(multiArray: $0) }
        return try MLDictionaryFeatureProvider(dictionary: features)
    }

    private func output(_ name: String, of outputs: MLFeatureProvider) throws -> [Float] {
        guard let array = outputs.featureValue(for: name)?.multiArrayValue else {
            throw DemoError("The package has no output \(name).")
        }
        return MLShapedArray<Float>(converting: array).scalars
    }
}
