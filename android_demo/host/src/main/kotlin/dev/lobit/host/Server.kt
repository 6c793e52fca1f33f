package dev.lobit.host

import java.io.BufferedOutputStream
import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.EOFException
import java.io.FileOutputStream
import org.pytorch.executorch.EValue
import org.pytorch.executorch.ExecuTorchRuntime
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import kotlin.system.exitProcess

/**
 * Runs a program for another process: `Server LIBRARIES PROGRAM METHOD THREADS ANSWERS`.
 *
 * Requests come on stdin, answers go to the file ANSWERS, since native code prints to stdout. All numbers are big-endian. A request is the
 * number of tokens n (int32), the position of the first (int64) and n tokens (int64). An answer is a status (int8), the number of bytes
 * that follow (int32), and these: with status [DONE], float32 logits; with [FAILED], a message in UTF-8. The first answer, before any
 * request, is the names of the library's backends. The end of stdin ends the process.
 */
fun main(arguments: Array<String>) {
    val (libraries, program, method, threads, answers) = arguments
    val out = DataOutputStream(BufferedOutputStream(FileOutputStream(answers)))
    try {
        Libraries.load(libraries)
        val module = Module(program, threads.toInt())
        out.answer(DONE, ExecuTorchRuntime.getRegisteredBackends().joinToString(" ").toByteArray())
        serve(module, method, DataInputStream(System.`in`.buffered()), out)
    } catch (error: Throwable) {
        out.answer(FAILED, "$error".toByteArray())
    }
    exitProcess(0) // fbjni has a thread that would keep the process alive
}

private const val DONE = 0
private const val FAILED = 1

private fun serve(module: Module, method: String, requests: DataInputStream, out: DataOutputStream) {
    while (true) {
        val count = try { requests.readInt() } catch (_: EOFException) { return }
        val position = requests.readLong()
        val tokens = LongArray(count) { requests.readLong() }
        try {
            val result = module.execute(method, EValue.from(Tensor.of(tokens, 1, count.toLong())), EValue.from(Tensor.of(longArrayOf(position), 1)))
            out.answer(DONE, bytes(result[0].toTensor().floats()))
        } catch (error: Exception) {
            out.answer(FAILED, "$error".toByteArray())
        }
    }
}

private fun bytes(floats: FloatArray): ByteArray {
    val buffer = java.nio.ByteBuffer.allocate(floats.size * Float.SIZE_BYTES)
    buffer.asFloatBuffer().put(floats)
    return buffer.array()
}

private fun DataOutputStream.answer(status: Int, content: ByteArray) {
    writeByte(status)
    writeInt(content.size)
    write(content)
    flush()
}
