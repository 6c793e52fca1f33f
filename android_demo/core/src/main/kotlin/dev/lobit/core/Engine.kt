package dev.lobit.core

/**
 * A program that reads tokens and remembers them. Its verbs are those of lobit's Python engines (`runtime/engine.py`).
 *
 * An engine is used by one thread at a time.
 */
interface Engine : AutoCloseable {
    /** Number of positions that it can hold. */
    val context: Int

    /** The most tokens that one call of the program reads; [prefill] takes longer texts apart. */
    val chunk: Int

    /** Number of tokens read since the last [reset]. */
    val position: Int

    /** Reads tokens after those already read; returns the logits after the last one, as many as the vocabulary has entries. */
    fun prefill(tokens: LongArray): FloatArray

    /** Reads one token; returns the logits after it. */
    fun decode(token: Long): FloatArray = prefill(longArrayOf(token))

    /**
     * One call of the program: reads 1 to [chunk] tokens, the first of which has the given position, over whatever was read there before.
     *
     * Returns what the program returns: the logits after the last token, or after each of them.
     */
    fun step(tokens: LongArray, position: Long): FloatArray

    fun reset()
}

/** An [Engine] made of [step] alone. */
abstract class ChunkedEngine(final override val context: Int, final override val chunk: Int) : Engine {
    final override var position = 0
        private set

    override fun prefill(tokens: LongArray): FloatArray {
        require(tokens.isNotEmpty()) { "there are no tokens to read" }
        require(position + tokens.size <= context) { "${position + tokens.size} tokens are more than the context of $context" }
        var logits = FloatArray(0)
        for (start in tokens.indices step chunk) {
            val part = tokens.copyOfRange(start, minOf(start + chunk, tokens.size))
            logits = step(part, position.toLong())
            position += part.size
        }
        return logits
    }

    override fun reset() {
        position = 0
    }
}

/**
 * A program with its tokenizer that continues text. What it has read and written stays in its cache from call to call, until [reset].
 *
 * [generate] blocks; it is called on a thread of its own, [stop] on any.
 */
interface TextEngine : AutoCloseable {
    /**
     * Reads [prompt] after what was read before, and writes until a stop token, or until the conversation has [length] tokens in all.
     *
     * [onText] is called with each piece of text. Special tokens in [prompt] are read as such; a token that should begin the text is a
     * part of it. The counts come at the end.
     */
    fun generate(prompt: String, length: Int, temperature: Float, onText: (String) -> Unit): Counts

    /** Ends a call of [generate] after its current token. */
    fun stop()

    fun reset()
}

/** What a call of [TextEngine.generate] read and wrote, with times as far as the runtime tells them. */
data class Counts(
    val promptTokens: Int,
    val generatedTokens: Int,
    val prefillMillis: Long,
    val decodeMillis: Long,
    val firstTokenMillis: Long,
) {
    /** Tokens a second of reading; null where it was too quick to be timed. */
    val prefillRate: Double? get() = rate(promptTokens, prefillMillis)

    /** Tokens a second of writing, the first token not counted. */
    val decodeRate: Double? get() = rate(generatedTokens - 1, decodeMillis)

    private fun rate(tokens: Int, millis: Long) = if (tokens > 0 && millis > 0) tokens * 1000.0 / millis else null
}

/** Makes engines of bundles; a target is one implementation. */
interface Runtime {
    /** An engine that reads tokens. [threads]: 0 means as many as the bundle says, or the runtime's own choice. */
    fun engine(bundle: Bundle, threads: Int = 0): Engine

    /** An engine that continues text. */
    fun textEngine(bundle: Bundle): TextEngine

    /** Names of the backends that the runtime has. */
    val backends: List<String>
}

/** What a person can act on: a sentence to show as it is. */
class LobitException(message: String, cause: Throwable? = null) : Exception(message, cause)
