package dev.lobit.host

import dev.lobit.core.Bundle
import dev.lobit.core.ExecuTorch
import dev.lobit.core.LobitException
import java.io.File
import kotlin.system.exitProcess

/**
 * Reads tokens as the app does: `Read LIBRARIES BUNDLE SCRATCH LOGITS ANSWER TOKENS...`.
 *
 * Each of TOKENS has the tokens of a call, `1,2,3`, or nothing for a reset. The logits of all calls go to the file LOGITS; to the file
 * ANSWER goes a sentence for why the bundle does not run, or does not chat.
 */
fun main(arguments: Array<String>) {
    val (libraries, folder, scratch, logits, answer) = arguments
    val calls = arguments.drop(5).map { text -> text.split(',').filter { it.isNotEmpty() }.map(String::toLong).toLongArray() }
    Libraries.load(libraries)
    val bundle = File(folder).let { Bundle(it, Bundle.manifest(it)) }
    val runtime = ExecuTorch(File(scratch))
    try {
        runtime.engine(bundle).use { writeFloats(File(logits), called(it, calls)) }
        runtime.textEngine(bundle).close()
    } catch (error: LobitException) {
        File(answer).writeText(error.message.orEmpty())
    }
    exitProcess(0) // fbjni has a thread that would keep the process alive
}
