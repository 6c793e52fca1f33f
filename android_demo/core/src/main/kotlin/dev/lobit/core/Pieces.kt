package dev.lobit.core

import java.io.InputStream

private const val PIECE = 1 shl 16

/**
 * Reads a stream to its end, some bytes at a time. [each] gets a buffer, how many bytes of it were read, and how many there were in all,
 * these included; it may throw in order to cancel. Returns the number of all bytes.
 */
fun InputStream.forEachPiece(each: (buffer: ByteArray, size: Int, done: Long) -> Unit): Long {
    val buffer = ByteArray(PIECE)
    var done = 0L
    while (true) {
        val size = read(buffer)
        if (size < 0) return done
        done += size
        each(buffer, size, done)
    }
}
