package dev.lobit.core

import dev.lobit.core.template.ChatTemplate

/** A turn of a conversation. [role] is `system`, `user` or `assistant`. */
data class Message(val role: String, val text: String)

/**
 * A conversation with a bundle's model, or, where the model has no chat template, texts that it continues.
 *
 * The engine keeps what it has read: a turn reads only what the rendered conversation has more than before. Where a template rewrites older
 * turns, all of it is read again. Used by one thread at a time, but for [stop].
 */
class Conversation(private val engine: TextEngine, private val manifest: Manifest) {
    private val template = manifest.tokens.chatTemplate?.let(::ChatTemplate)
    private val turns = mutableListOf<Message>()

    /** The text that is in the engine's cache. */
    private var read = ""

    @Volatile private var stopped = false

    /** Whether turns are turns of a chat; otherwise each text is continued on its own. */
    val chats: Boolean get() = template != null

    /** The turns so far; an answer that was cut short is among them as far as it came. */
    val messages: List<Message> get() = turns.toList()

    /**
     * Answers [text], with at most [length] tokens; [onText] gets the pieces of the answer.
     *
     * Where it fails before a word of the answer, the conversation is as before. Throws [LobitException] with a sentence.
     */
    fun reply(text: String, length: Int, temperature: Float, onText: (String) -> Unit): Counts {
        val before = turns.toList()
        turns += Message(USER, text)
        stopped = false
        val rendered = rendered(text)
        val known = template != null && read.isNotEmpty() && rendered.startsWith(read)
        if (!known) forget()
        val answer = StringBuilder()
        var pieces = 0
        try {
            val counts = engine.generate(if (known) rendered.substring(read.length) else rendered, manifest.context, temperature) { piece ->
                if (!stopped) {
                    // Some tokenizers put a space before each word, so also before the first one of an answer.
                    val shown = if (template != null && answer.isEmpty()) piece.removePrefix(" ") else piece
                    answer.append(shown)
                    onText(shown)
                }
                pieces++
                if (stopped || pieces >= length) engine.stop()
            }
            turns += Message(ASSISTANT, answer.toString())
            read = rendered + answer
            return counts
        } catch (error: Throwable) {
            turns.clear()
            turns += before
            forget()
            if (answer.isNotEmpty()) turns += listOf(Message(USER, text), Message(ASSISTANT, answer.toString()))
            throw when {
                error is LobitException || error is Error -> error
                answer.isEmpty() -> LobitException("the answer failed: ${error.message}", error)
                // ExecuTorch's runner does not count the prompt, and its program refuses the token after the last position.
                else -> LobitException("the answer ends here, the context of ${manifest.context} tokens is full: begin anew", error)
            }
        }
    }

    private fun rendered(text: String): String {
        if (template == null) return beginning() + text
        return template.render(turns.map { mapOf("role" to it.role, "content" to it.text) }, manifest.tokens.special, true)
    }

    /** The token that the tokenizer puts before a text, where it does: the runtime adds none itself. */
    private fun beginning() = if (manifest.tokens.bos == null) "" else manifest.tokens.special["bos_token"].orEmpty()

    /** Ends an answer after its current token; may be called from any thread. */
    fun stop() {
        stopped = true
        engine.stop()
    }

    /** Begins anew, with [system] as the system message where it is not blank. */
    fun reset(system: String = "") {
        turns.clear()
        if (system.isNotBlank()) turns += Message(SYSTEM, system)
        forget()
    }

    private fun forget() {
        read = ""
        engine.reset()
    }

    companion object {
        const val SYSTEM = "system"
        const val USER = "user"
        const val ASSISTANT = "assistant"
    }
}
