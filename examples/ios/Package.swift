// swift-tools-version: 5.9

import PackageDescription

// Of the wheel that exported the bundle: a program is read by its own version or a later one.
let executorch = "swiftpm-1.5.1"

let package = Package(
    name: "FastVLMBench",
    platforms: [.iOS(.v17), .macOS(.v14)],  // the oldest that ExecuTorch's package takes
    products: [
        .library(name: "FastVLMBench", targets: ["FastVLMBench"])
    ],
    dependencies: [
        .package(url: "https://github.com/pytorch/executorch.git", branch: executorch)
    ],
    targets: [
        .target(
            name: "FastVLMBench",
            dependencies: [
                .product(name: "executorch_llm", package: "executorch"),
                .product(name: "backend_xnnpack", package: "executorch"),
                .product(name: "kernels_optimized", package: "executorch"),
            ]
        ),
        .executableTarget(
            name: "fastvlm-bench",
            dependencies: ["FastVLMBench"],
            // Kernels and delegates register themselves at start; the linker would drop them.
            linkerSettings: [.unsafeFlags(["-Wl,-all_load"])]
        ),
    ]
)
