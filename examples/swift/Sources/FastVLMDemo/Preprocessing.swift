import CoreGraphics
import Foundation
import ImageIO

/// How an image becomes pixels: the contract that the bundle was exported and proven with.
struct Preprocessing: Decodable {
    enum Strategy: String, Decodable {
        /// Centred on a square of the mean colour, then resized.
        case pad
        /// Shortest edge resized, then cut from the centre.
        case crop
        /// Resized to the square, whatever its proportions.
        case stretch
    }

    let strategy: Strategy
    let resolution: Int
    let mean: [Double]
    let std: [Double]
    let resampling: String

    /// The image as `(x / 255 - mean) / std`, shape [1, 3, resolution, resolution].
    ///
    /// PIL's bicubic resampling, which the bundle was proven with: it averages where it shrinks, as
    /// the system's own bicubic filter does not. Rows first, then columns, each rounded to bytes;
    /// PIL 13 takes tall images the other way round, a few levels apart with `crop` and `stretch`.
    func pixels(of image: RGBAImage) -> [Float] {
        let side = resolution
        let columns = taps(image.width, image.height)
        let rows = taps(image.height, image.width)
        var pixels = [Float](repeating: 0, count: 3 * side * side)
        for channel in 0..<3 {
            let background = Float(Int(255 * mean[channel]))
            var narrow = [Float](repeating: 0, count: image.height * side)
            for row in 0..<image.height {
                for (column, tap) in columns.enumerated() {
                    narrow[row * side + column] = tap.sum(image.width, background) {
                        Float(image.bytes[4 * (row * image.width + $0) + channel])
                    }
                }
            }
            for (row, tap) in rows.enumerated() {
                for column in 0..<side {
                    let level = tap.sum(image.height, background) { narrow[$0 * side + column] }
                    pixels[(channel * side + row) * side + column] = Float(
                        (Double(level) / 255 - mean[channel]) / std[channel])
                }
            }
        }
        return pixels
    }

    /// What each pixel of the square is summed from, along an axis of `size` pixels.
    private func taps(_ size: Int, _ other: Int) -> [Tap] {
        switch strategy {
        case .pad:
            let longest = max(size, other)
            return Tap.all(from: longest, to: resolution, shift: (longest - size) / 2)
        case .crop:
            let scaled = resolution * size / min(size, other)
            let start = (scaled - resolution) / 2
            return Array(Tap.all(from: size, to: scaled)[start..<(start + resolution)])
        case .stretch:
            return Tap.all(from: size, to: resolution)
        }
    }
}

/// The input pixels that one output pixel is summed from: the first of them, and the weights.
struct Tap {
    let first: Int
    let weights: [Float]

    /// Each output pixel's, `shift` pixels to the left of where they would be.
    static func all(from size: Int, to count: Int, shift: Int = 0) -> [Tap] {
        let scale = Double(size) / Double(count)
        let stretch = max(scale, 1)
        return (0..<count).map { index in
            let centre = (Double(index) + 0.5) * scale
            let first = max(Int(centre - 2 * stretch + 0.5), 0)
            let end = min(Int(centre + 2 * stretch + 0.5), size)
            let weights = (first..<end).map { bicubic((Double($0) - centre + 0.5) / stretch) }
            let sum = weights.reduce(0, +)
            return Tap(first: first - shift, weights: weights.map { Float($0 / sum) })
        }
    }

    /// The weighted sum of `size` levels, rounded to a byte's; beyond them is the background.
    @inline(__always)
    func sum(_ size: Int, _ background: Float, _ level: (Int) -> Float) -> Float {
        var sum: Float = 0
        for (offset, weight) in weights.enumerated() {
            let index = first + offset
            sum += weight * (index >= 0 && index < size ? level(index) : background)
        }
        return min(max(sum.rounded(), 0), 255)
    }

    /// Keys' cubic convolution with a = -1/2.
    private static func bicubic(_ distance: Double) -> Double {
        let x = abs(distance)
        if x < 1 { return (1.5 * x - 2.5) * x * x + 1 }
        return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0
    }
}

/// 8-bit RGBA, rows from the top.
struct RGBAImage {
    let width: Int
    let height: Int
    let bytes: [UInt8]

    /// Reads an image file. Its colours and its stored orientation are left as they are.
    init(contentsOf url: URL) throws {
        guard let source = CGImageSourceCreateWithURL(url as CFURL, nil),
            let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
        else { throw DemoError("\(url.path) cannot be read as an image.") }
        width = image.width
        height = image.height
        var space = CGColorSpaceCreateDeviceRGB()
        if let own = image.colorSpace, own.model == .rgb { space = own }  // nothing to convert
        var rgba = [UInt8](repeating: 0, count: 4 * image.width * image.height)
        let drawn = rgba.withUnsafeMutableBytes { buffer -> Bool in
            guard
                let context = CGContext(
                    data: buffer.baseAddress, width: image.width, height: image.height,
                    bitsPerComponent: 8, bytesPerRow: 4 * image.width, space: space,
                    bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
            else { return false }
            context.draw(image, in: CGRect(x: 0, y: 0, width: image.width, height: image.height))
            return true
        }
        guard drawn else { throw DemoError("\(url.path) has a colour space that is not drawn.") }
        bytes = rgba
    }
}
