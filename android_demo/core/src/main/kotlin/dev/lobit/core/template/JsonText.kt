package dev.lobit.core.template

import java.util.Locale

/** The filter `tojson`: JSON as Python's `json.dumps` writes it, not escaped for HTML. */
internal class JsonText(
    private val work: Work, private val ascii: Boolean, private val indent: String?, private val item: String, private val key: String,
    private val sort: Boolean,
) {
    private val out = StringBuilder()

    fun of(value: Any?): String {
        write(value, 0)
        return out.toString()
    }

    private fun write(value: Any?, level: Int) {
        work.step(1L + level)
        if (out.length > Work.LARGEST_TEXT) work.text(out.length.toLong())
        when (value) {
            null -> out.append("null")
            is Boolean -> out.append(value)
            is Long -> out.append(value)
            is Double -> out.append(double(value))
            is String -> string(value)
            is SafeText -> string(value.text)
            is List<*> -> group('[', ']', value, level) { write(it, level + 1) }
            is TupleValue -> group('[', ']', value.items, level) { write(it, level + 1) }
            is Map<*, *> -> group('{', '}', entries(value), level) { (name, member) ->
                string(name)
                out.append(key)
                write(member, level + 1)
            }
            else -> broken("${typeOf(value)} cannot be written as JSON")
        }
    }

    private fun double(value: Double) = when {
        value.isNaN() -> "NaN"
        value.isInfinite() -> if (value > 0) "Infinity" else "-Infinity"
        else -> Doubles.text(value)
    }

    private fun entries(map: Map<*, *>): List<Pair<String, Any?>> {
        val found = map.entries.toList()
        val sorted = if (sort) found.sortedWith { a, b -> work.compare(a.key, b.key) ?: 0 } else found
        return sorted.map { (name, value) -> (if (name == null) "null" else work.printed(name)) to value }
    }

    private fun <T> group(open: Char, close: Char, items: List<T>, level: Int, write: (T) -> Unit) {
        out.append(open)
        items.forEachIndexed { i, entry ->
            if (i > 0) out.append(item)
            line(level + 1)
            write(entry)
        }
        if (items.isNotEmpty()) line(level)
        out.append(close)
    }

    private fun line(level: Int) {
        if (indent != null) out.append('\n').append(indent.repeat(level))
    }

    private fun string(text: String) {
        out.append('"')
        for (letter in text) {
            when {
                letter == '"' || letter == '\\' -> out.append('\\').append(letter)
                letter == '\n' -> out.append("\\n")
                letter == '\r' -> out.append("\\r")
                letter == '\t' -> out.append("\\t")
                letter == '\u000c' -> out.append("\\f")
                letter == '\b' -> out.append("\\b")
                letter < ' ' || (ascii && letter > '~') -> out.append("\\u%04x".format(Locale.ROOT, letter.code))
                else -> out.append(letter)
            }
        }
        out.append('"')
    }

    companion object {
        fun filter(work: Work, value: Any?, arguments: Arguments): String {
            val given = arguments.bind("tojson", 0, "ensure_ascii", "indent", "separators", "sort_keys")
            val indent = when (val told = given[1].or(null)) {
                null -> null
                is Long -> " ".repeat(minOf(maxOf(told, 0), WIDEST + 1).toInt())
                is String -> told
                else -> unknown("an indent of tojson that is ${typeOf(told)}")
            }
            if (indent != null && indent.length > WIDEST) unknown("an indent of tojson wider than $WIDEST")
            val separators = given[2].or(null)?.let { work.listed(it) } ?: listOf(if (indent == null) ", " else ",", ": ")
            if (separators.size != 2 || separators.any { it !is String }) broken("tojson takes two texts as separators")
            val (item, key) = separators.map { it as String }
            return JsonText(work, truth(given[0].or(false)), indent, item, key, truth(given[3].or(false))).of(value)
        }

        private const val WIDEST = 100L
    }
}
