// swift-tools-version: 6.0

import PackageDescription

let package = Package(
    name: "FastVLMDemo",
    platforms: [.macOS(.v15)],  // the first with model states and functions
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0")
    ],
    targets: [
        .executableTarget(
            name: "FastVLMDemo",
            dependencies: [.product(name: "Transformers", package: "swift-transformers")]
        )
    ],
    swiftLanguageModes: [.v5]
)
