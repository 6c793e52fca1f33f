package dev.lobit.host

import dev.lobit.core.Bundle
import dev.lobit.core.Json
import dev.lobit.core.LobitException
import dev.lobit.core.Manifest
import dev.lobit.core.Supported
import dev.lobit.core.reason
import dev.lobit.core.template.ChatTemplate
import java.io.File
import java.util.Base64
import org.json.JSONObject

/**
 * Answers questions about what the app's code does, for tests in Python: one JSON object a line on stdin, one a line on stdout.
 *
 * - `{"manifest": BASE64}`: what the reader makes of these bytes.
 * - `{"bundle": FOLDER, "hashes": true, "backends": [...]}`: what opening a folder gives where the library has such backends.
 * - `{"zip": FILE, "into": FOLDER}`: what unpacking a zip gives.
 * - `{"template": SOURCE, "messages": [...], "special": {...}, "prompt": true}`: the rendered text.
 * - those of Calls.kt.
 *
 * An answer has `outcome`, `read` or the name of the reason for a refusal, and `text` or `error`.
 */
fun main() {
    for (line in generateSequence(::readlnOrNull)) {
        val answer = try {
            answer(Json.parse(line) as Map<*, *>)
        } catch (error: LobitException) {
            JSONObject().put("outcome", error.reason?.name?.lowercase() ?: "refused").put("error", error.message)
        }
        println(answer.toString().map { if (it < '\u007f') "$it" else "\\u%04x".format(it.code) }.joinToString(""))
    }
}

private fun answer(question: Map<*, *>): JSONObject {
    val text = when {
        "manifest" in question -> about(Manifest.read(Base64.getDecoder().decode(question["manifest"] as String)))
        "bundle" in question -> {
            val supported = Supported(backends = { (question["backends"] as List<*>).map { "$it" } })
            about(Bundle.open(File(question["bundle"] as String), question["hashes"] as Boolean, supported).manifest)
        }
        "zip" in question -> File(question["zip"] as String).inputStream().use { zip ->
            about(Bundle.unzip(zip, File(question["into"] as String)).manifest)
        }
        "calls" in question -> recordedCalls(question)
        "floats" in question -> convertedFloats(question)
        else -> rendered(question)
    }
    return JSONObject().put("outcome", "read").put("text", text)
}

private fun about(manifest: Manifest) = manifest.toString()

@Suppress("UNCHECKED_CAST")
private fun rendered(question: Map<*, *>): String = ChatTemplate(question["template"] as String).render(
    question["messages"] as List<Map<String, Any?>>, question["special"] as Map<String, String>, question["prompt"] as Boolean,
)
