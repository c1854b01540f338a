import FastVLMBench
import Foundation

guard CommandLine.arguments.count == 2 else {
    FileHandle.standardError.write(Data("Usage: fastvlm-bench KIT\n".utf8))
    exit(2)
}
do {
    try FastVLMBench.run(kit: URL(fileURLWithPath: CommandLine.arguments[1]))
} catch {
    FileHandle.standardError.write(Data("fastvlm-bench: \(error.localizedDescription)\n".utf8))
    exit(1)
}
