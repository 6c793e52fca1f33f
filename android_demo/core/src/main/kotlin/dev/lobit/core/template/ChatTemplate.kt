package dev.lobit.core.template

import dev.lobit.core.LobitException
import java.time.LocalDateTime

/**
 * A model's chat template: Jinja, as Hugging Face renders it and lobit's `chat_template.py` does.
 *
 * It knows what the templates of chat models use, and refuses anything else by its name. A template is not trusted: it sees plain values,
 * and what it may do and write is bounded. The constructor and [render] throw [LobitException] with a sentence.
 */
class ChatTemplate(private val source: String, private val now: () -> LocalDateTime = LocalDateTime::now) {
    private val statements = told("", { 0 }) { Parser(Lexer(source).tokens()).template() }

    /**
     * The conversation as one text.
     *
     * [messages] have text, numbers, truths, null, lists and maps; members that are null count as absent. [special] has the texts of
     * special tokens by the names that the template may use for them. [addGenerationPrompt] asks for the words that begin an answer.
     */
    fun render(messages: List<Map<String, Any?>>, special: Map<String, String>, addGenerationPrompt: Boolean): String {
        if (messages.isEmpty()) throw LobitException("there are no messages to render: a chat needs at least one")
        val work = Work()
        val renderer = Renderer(work)
        return told("these ${messages.size} messages", { renderer.evaluator.line }) {
            val present = messages.map { message -> plain(message.filterValues { it != null }) }
            val given = mapOf("messages" to present, "tools" to null, "documents" to null, "add_generation_prompt" to addGenerationPrompt)
            val variables = Scope(Scope(null, Globals(work, now).values.toMutableMap()), (special + given).toMutableMap())
            renderer.render(statements, variables)
        }
    }

    private fun plain(value: Any?): Any? = when (value) {
        is Int -> value.toLong()
        is Float -> value.toDouble()
        is Map<*, *> -> value.entries.associate { "${it.key}" to plain(it.value) }
        is List<*> -> value.map { plain(it) }
        null, is String, is Boolean, is Long, is Double -> value
        else -> broken("a message has a ${value::class.java.simpleName}, which is no plain value")
    }

    private fun <T> told(messages: String, line: () -> Int, act: () -> T): T {
        fun place() = line().let { if (it > 0) " in line $it" else "" }
        val way = "continue a text without a chat, or mend the template and export the bundle again"
        return try {
            act()
        } catch (problem: Refused) {
            throw LobitException("$IT refuses $messages: ${problem.message}: change them, or begin a new chat", problem)
        } catch (problem: Unknown) {
            throw LobitException("$IT uses ${problem.what}${place()}, which this app does not know: $way", problem)
        } catch (problem: Broken) {
            throw LobitException("$IT does not work${place()} (${problem.message}): $way", problem)
        } catch (problem: ArithmeticException) {
            throw LobitException("$IT does not work${place()} (a number is too large): $way", problem)
        } catch (problem: StackOverflowError) {
            throw LobitException("$IT does not work${place()} (its values or macros are nested too deeply): $way", problem)
        }
    }

    private companion object {
        const val IT = "the model's chat template"
    }
}
