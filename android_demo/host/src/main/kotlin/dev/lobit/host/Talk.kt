package dev.lobit.host

import dev.lobit.core.Bundle
import dev.lobit.core.Conversation
import dev.lobit.core.ExecuTorch
import dev.lobit.core.LobitException
import java.io.File
import org.json.JSONObject
import kotlin.system.exitProcess

/**
 * Holds a conversation as the app does: `Talk LIBRARIES BUNDLE SCRATCH ANSWERS LENGTH TEXT...`.
 *
 * For each TEXT, a line of JSON goes to the file ANSWERS: the answer, and how many tokens were read and written; or an error's sentence.
 */
fun main(arguments: Array<String>) {
    val (libraries, folder, scratch, answers, length) = arguments
    File(answers).bufferedWriter().use { out ->
        try {
            Libraries.load(libraries)
            val bundle = Bundle.open(File(folder))
            val conversation = Conversation(ExecuTorch(File(scratch)).textEngine(bundle), bundle.manifest)
            for (text in arguments.drop(5)) {
                val answer = StringBuilder()
                val counts = conversation.reply(text, length.toInt(), temperature = 0f) { answer.append(it) }
                val told = JSONObject().put("text", "$answer").put("read", counts.promptTokens).put("written", counts.generatedTokens)
                out.write("$told\n")
            }
        } catch (error: LobitException) {
            out.write("${JSONObject().put("error", error.message)}\n")
        }
    }
    exitProcess(0) // fbjni has a thread that would keep the process alive
}
