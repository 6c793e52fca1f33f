package dev.lobit.core.template

import dev.lobit.core.printable
import java.util.Locale

/** Whether Python takes a character for space. */
internal fun isSpace(letter: Char): Boolean = letter in SPACES || letter in '\u2000'..'\u200a'

private const val SPACES = "\t\n\u000b\u000c\r \u001c\u001d\u001e\u001f\u0085\u00a0\u1680\u2028\u2029\u202f\u205f\u3000"

/** The characters of a text; Python counts code points. */
internal fun points(text: String): List<String> = buildList {
    var at = 0
    while (at < text.length) {
        val end = text.offsetByCodePoints(at, 1)
        add(text.substring(at, end))
        at = end
    }
}

internal fun length(text: String): Long = text.codePointCount(0, text.length).toLong()

internal fun upper(text: String): String = text.uppercase(Locale.ROOT)

internal fun lower(text: String): String = text.lowercase(Locale.ROOT)

/** Python's `str.title`: each run of letters begins with a capital. */
internal fun titled(text: String): String {
    var inside = false
    return points(text).joinToString("") { letter ->
        val cased = letter.codePointAt(0).let { Character.isUpperCase(it) || Character.isLowerCase(it) || Character.isTitleCase(it) }
        val shown = if (!cased) letter else if (inside) lower(letter) else capital(letter)
        inside = cased
        shown
    }
}

/** A letter as a word begins with it: of ligatures such as `ﬁ` only the first part is a capital. */
private fun capital(letter: String): String {
    val large = upper(letter)
    if (large.length == letter.length) return String(Character.toChars(Character.toTitleCase(letter.codePointAt(0))))
    return points(large).let { it[0] + lower(it.drop(1).joinToString("")) }
}

/** Python's `str.capitalize`. */
internal fun capitalized(text: String): String {
    val first = points(text).firstOrNull() ?: return ""
    return capital(first) + lower(text.substring(first.length))
}

/** Python's `str.strip` of [chars], or of space where it is null. */
internal fun stripped(text: String, chars: String?, left: Boolean = true, right: Boolean = true): String {
    if (chars != null && chars.any { it.isSurrogate() }) unknown("stripping rare characters")
    val leaves = { letter: Char -> if (chars == null) isSpace(letter) else letter in chars }
    val end = if (right) text.trimEnd(leaves) else text
    return if (left) end.trimStart(leaves) else end
}

/** Python's `str.split`: at [separator], or at runs of space where it is null, at most [most] times where that is not negative. */
internal fun split(text: String, separator: String?, most: Long): List<String> {
    if (separator == null) return words(text, most)
    if (separator.isEmpty()) broken("text is split at nothing")
    val found = ArrayList<String>()
    var at = 0
    while (most < 0 || found.size < most) {
        val end = text.indexOf(separator, at)
        if (end < 0) break
        found += text.substring(at, end)
        at = end + separator.length
    }
    return found + text.substring(at)
}

private fun words(text: String, most: Long): List<String> {
    val found = ArrayList<String>()
    var rest = text.trimStart { isSpace(it) }
    while (rest.isNotEmpty()) {
        if (most >= 0 && found.size >= most) return found + rest
        found += rest.takeWhile { !isSpace(it) }
        rest = rest.drop(found.last().length).trimStart { isSpace(it) }
    }
    return found
}

/** Python's `str.rsplit` at [separator]. */
internal fun splitFromEnd(text: String, separator: String, most: Long): List<String> =
    split(text.reversed(), separator.reversed(), most).map { it.reversed() }.reversed()

private const val LINE_ENDS = "\n\r\u000b\u000c\u001c\u001d\u001e\u0085\u2028\u2029"

/** Python's `str.splitlines`. */
internal fun lines(text: String, keepEnds: Boolean): List<String> {
    val found = ArrayList<String>()
    var start = 0
    while (start < text.length) {
        val end = (start until text.length).find { text[it] in LINE_ENDS } ?: text.length
        val next = if (text.startsWith("\r\n", end)) end + 2 else minOf(end + 1, text.length)
        found += text.substring(start, if (keepEnds) next else end)
        start = next
    }
    return found
}

/** Python's `str.replace`. */
internal fun replaced(text: String, old: String, new: String, most: Long): String {
    if (old.isNotEmpty()) return split(text, old, most).joinToString(new)
    val letters = points(text)
    val times = if (most < 0) letters.size + 1L else most
    val found = letters.withIndex().joinToString("") { (i, letter) -> if (i < times) new + letter else letter }
    return if (letters.size < times) found + new else found
}

/** Python's `repr` of a text. */
internal fun quoted(text: String): String {
    val quote = if ('\'' in text && '"' !in text) '"' else '\''
    val found = StringBuilder().append(quote)
    for (letter in points(text)) {
        val point = letter.codePointAt(0)
        when {
            letter == "\\" || letter == "$quote" -> found.append('\\').append(letter)
            letter == "\n" -> found.append("\\n")
            letter == "\r" -> found.append("\\r")
            letter == "\t" -> found.append("\\t")
            printable(point) -> found.append(letter)
            point < 0x100 -> found.append("\\x%02x".format(Locale.ROOT, point))
            point < 0x10000 -> found.append("\\u%04x".format(Locale.ROOT, point))
            else -> found.append("\\U%08x".format(Locale.ROOT, point))
        }
    }
    return found.append(quote).toString()
}
