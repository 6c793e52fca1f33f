package dev.lobit.core.template

internal enum class Kind { DATA, PRINT_BEGIN, PRINT_END, BLOCK_BEGIN, BLOCK_END, NAME, STRING, NUMBER, OPERATOR, END }

/** [value] is the text of data, names and operators, the content of strings, and a Long or Double for numbers. */
internal class Token(val line: Int, val kind: Kind, val value: Any) {
    fun isOperator(text: String) = kind == Kind.OPERATOR && value == text

    fun isName(text: String) = kind == Kind.NAME && value == text

    override fun toString() = when (kind) {
        Kind.END -> "the end of the template"
        Kind.DATA -> "text"
        Kind.PRINT_END -> "}}"
        Kind.BLOCK_END -> "%}"
        else -> "$value"
    }
}

/**
 * Takes a template apart as Jinja does with `trim_blocks` and `lstrip_blocks`: the line break after a block or comment is left out, and so
 * are spaces before one at the beginning of a line; a minus sign leaves out all space on its side, a plus sign none.
 */
internal class Lexer(source: String) {
    private val text = source.replace("\r\n", "\n").replace('\r', '\n').removeSuffix("\n")
    private val tokens = ArrayList<Token>()
    private var at = 0
    private var line = 1
    private var lineStarting = true

    fun tokens(): List<Token> {
        while (at < text.length) {
            val tag = nextTag()
            if (tag < 0) {
                data(text.substring(at))
                at = text.length
            } else {
                tag(tag)
            }
        }
        tokens += Token(line, Kind.END, "")
        return tokens
    }

    private fun nextTag(): Int = (at until text.length - 1).find { text[it] == '{' && text[it + 1] in "{%#" } ?: -1

    private fun data(content: String) {
        if (content.isNotEmpty()) tokens += Token(line, Kind.DATA, content)
    }

    /** Moves to [end], counting lines. */
    private fun move(end: Int) {
        for (i in at until end) if (text[i] == '\n') line++
        if (end > at) lineStarting = text[end - 1] == '\n'
        at = end
    }

    private fun tag(begin: Int) {
        val raw = rawBegin(begin)
        val prints = text[begin + 1] == '{'
        val sign = text.getOrNull(begin + 2).takeIf { it == '-' || it == '+' }
        data(stripped(text.substring(at, begin), sign, strips = !prints))
        move(begin)
        when {
            raw != null -> raw(raw)
            text[begin + 1] == '#' -> comment(begin + if (sign == null) 2 else 3)
            else -> inside(prints, begin + if (sign == null) 2 else 3)
        }
    }

    /** Text before a tag, without the space that the tag takes away. */
    private fun stripped(content: String, sign: Char?, strips: Boolean): String {
        if (sign == '-') return content.trimEnd { isSpace(it) }
        val start = content.lastIndexOf('\n') + 1
        val ownLine = start > 0 || lineStarting
        return if (sign == null && strips && ownLine && content.drop(start).all { isSpace(it) }) content.take(start) else content
    }

    private fun skipSpace(from: Int): Int {
        var end = from
        while (end < text.length && isSpace(text[end])) end++
        return end
    }

    /** Where a tag ends whose closing sign begins at [from], or null where it does not close there. */
    private fun closed(from: Int, mark: String): Int? {
        val sign = text.getOrNull(from).takeIf { (it == '-' || (it == '+' && mark != "}}")) && text.startsWith(mark, from + 1) }
        val start = if (sign == null) from else from + 1
        val end = if (text.startsWith(mark, start)) start + mark.length else return null
        return when {
            sign == '-' -> skipSpace(end)
            sign == null && mark != "}}" && text.getOrNull(end) == '\n' -> end + 1
            else -> end
        }
    }

    private fun comment(from: Int) {
        if (from == text.length) return move(from) // as Jinja does
        val end = (from..text.length).firstNotNullOfOrNull { closed(it, "#}") } ?: brokenHere("a comment does not end")
        move(end)
    }

    /** Where the content of a `raw` block begins that begins at [begin]; null where another tag does. */
    private fun rawBegin(begin: Int): Int? = word(begin, "raw")?.let { end ->
        when {
            text.startsWith("-%}", end) -> skipSpace(end + 3)
            text.startsWith("%}", end) -> end + 2
            else -> null
        }
    }

    /** Where the space ends after a word that follows `{%`. */
    private fun word(begin: Int, name: String): Int? {
        if (!text.startsWith("{%", begin)) return null
        val start = skipSpace(if (text.getOrNull(begin + 2).let { it == '-' || it == '+' }) begin + 3 else begin + 2)
        return if (text.startsWith(name, start)) skipSpace(start + name.length) else null
    }

    private fun raw(start: Int) {
        move(start)
        if (start == text.length) return
        for (begin in start..text.length - 2) {
            val end = word(begin, "endraw")?.let { closed(it, "%}") } ?: continue
            val sign = text[begin + 2].takeIf { it == '-' || it == '+' }
            data(stripped(text.substring(start, begin), sign, strips = true))
            return move(end)
        }
        brokenHere("a raw block does not end")
    }

    private fun inside(prints: Boolean, from: Int) {
        move(from)
        tokens += Token(line, if (prints) Kind.PRINT_BEGIN else Kind.BLOCK_BEGIN, "")
        val open = ArrayDeque<Char>()
        while (true) {
            move(skipSpace(at))
            val end = if (open.isEmpty()) closed(at, if (prints) "}}" else "%}") else null
            if (end != null) {
                tokens += Token(line, if (prints) Kind.PRINT_END else Kind.BLOCK_END, "")
                return move(end)
            }
            if (at >= text.length) brokenHere("a tag does not end")
            part(open)
        }
    }

    private fun part(open: ArrayDeque<Char>) {
        val letter = text[at]
        val end = when {
            letter in '0'..'9' -> Numbers.end(text, at).also { tokens += Token(line, Kind.NUMBER, Numbers.read(text.substring(at, it))) }
            letter == '_' || Character.isUnicodeIdentifierStart(letter) -> {
                var last = at
                while (last < text.length && (text[last] == '_' || isNamePart(text[last]))) last++
                last.also { tokens += Token(line, Kind.NAME, text.substring(at, it)) }
            }
            letter == '\'' || letter == '"' -> string(letter)
            else -> operator(open)
        }
        move(end)
    }

    private fun isNamePart(letter: Char) = Character.isUnicodeIdentifierPart(letter) && !Character.isIdentifierIgnorable(letter)

    private fun string(quote: Char): Int {
        var end = at + 1
        while (end < text.length && text[end] != quote) end += if (text[end] == '\\') 2 else 1
        if (end >= text.length) brokenHere("a string does not end")
        tokens += Token(line, Kind.STRING, Escapes.read(text.substring(at + 1, end)))
        return end + 1
    }

    private fun operator(open: ArrayDeque<Char>): Int {
        val found = OPERATORS.find { text.startsWith(it, at) } ?: brokenHere("an unexpected character '${text[at]}'")
        val last = found.last()
        if (last in CLOSING) open.addLast(CLOSING.getValue(last))
        if (last in CLOSING.values && open.removeLastOrNull() != last) brokenHere("an unexpected '$found'")
        tokens += Token(line, Kind.OPERATOR, found)
        return at + found.length
    }

    private fun brokenHere(what: String): Nothing = broken("line $line: $what")

    private companion object {
        /** Longer ones first. */
        val OPERATORS = listOf(
            "//", "**", "==", "!=", ">=", "<=",
            "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".", ":", "|", ",", ";",
        )
        val CLOSING = mapOf('(' to ')', '[' to ']', '{' to '}')
    }
}

/** Numbers as templates write them. */
internal object Numbers {
    private val DIGITS = "[0-9](?:_?[0-9])*"
    private val FLOAT = Regex("$DIGITS(?:(?:\\.$DIGITS)?[eE][+-]?$DIGITS|\\.$DIGITS)")
    private val BASED = Regex("0[bB](?:_?[01])+|0[oO](?:_?[0-7])+|0[xX](?:_?[0-9a-fA-F])+")
    private val WHOLE = Regex("[1-9](?:_?[0-9])*|0(?:_?0)*")

    /** Where the number ends that begins at [start]. A number after a dot is an index. */
    fun end(text: String, start: Int): Int {
        val kinds = if (start > 0 && text[start - 1] == '.') listOf(BASED, WHOLE) else listOf(FLOAT, BASED, WHOLE)
        return kinds.firstNotNullOf { match(it, text, start) }
    }

    private fun match(kind: Regex, text: String, start: Int): Int? {
        val matcher = kind.toPattern().matcher(text).region(start, text.length)
        return if (matcher.lookingAt()) matcher.end() else null
    }

    fun read(written: String): Any {
        val plain = written.replace("_", "").lowercase()
        val whole = when {
            plain.startsWith("0b") -> plain.drop(2).toLongOrNull(2)
            plain.startsWith("0o") -> plain.drop(2).toLongOrNull(8)
            plain.startsWith("0x") -> plain.drop(2).toLongOrNull(16)
            '.' in plain || 'e' in plain -> return plain.toDouble()
            else -> plain.toLongOrNull()
        }
        return whole ?: unknown("a number as large as $written")
    }
}

/** The escapes of Python's strings. */
internal object Escapes {
    private val LETTERS = mapOf(
        '\\' to "\\", '\'' to "'", '"' to "\"", 'a' to "\u0007", 'b' to "\b", 'f' to "\u000c", 'n' to "\n", 'r' to "\r", 't' to "\t",
        'v' to "\u000b", '\n' to "",
    )
    private val LENGTHS = mapOf('x' to 2, 'u' to 4, 'U' to 8)

    fun read(written: String): String {
        val found = StringBuilder()
        var at = 0
        while (at < written.length) {
            val letter = written[at++]
            if (letter != '\\' || at == written.length) {
                found.append(letter)
                continue
            }
            val code = written[at++]
            val length = LENGTHS[code]
            when {
                length != null -> {
                    val digits = written.substring(at, minOf(at + length, written.length))
                    val point = digits.takeIf { it.length == length && it.all { digit -> Character.digit(digit, 16) >= 0 } }?.toLong(16)
                    if (point == null || point > Character.MAX_CODE_POINT) broken("an escape \\$code$digits that is no character")
                    found.appendCodePoint(point.toInt())
                    at += length
                }
                code in '0'..'7' -> {
                    val end = (at until minOf(at + 2, written.length)).find { written[it] !in '0'..'7' } ?: minOf(at + 2, written.length)
                    found.appendCodePoint(written.substring(at - 1, end).toInt(8))
                    at = end
                }
                code == 'N' || code > '~' -> unknown("an escape \\$code")
                else -> found.append(LETTERS[code] ?: "\\$code")
            }
        }
        return found.toString()
    }
}
