package dev.lobit.core.template

/** Methods of Python's values. */
internal class Methods(private val work: Work) {
    /** The method of a value, or null where Python has none of the name either. */
    fun of(value: Any?, name: String): Callable? {
        val known = when (value) {
            is String, is SafeText -> if (name in TEXT) Callable(name) { given -> text(plain(value), name, given) } else null
            is Map<*, *> -> if (name in DICT) Callable(name) { given -> dict(value, name, given) } else null
            is List<*> -> if (name in LIST) Callable(name) { given -> list(value, name, given) } else null
            is TupleValue -> if (name in LIST) Callable(name) { given -> list(value.items, name, given) } else null
            else -> null
        }
        if (known == null && (name.startsWith("_") || name in others(value))) unknown("$name of ${typeOf(value)}")
        return known
    }

    private fun plain(value: Any?) = value as? String ?: unknown("methods of text after the filter safe")

    private fun others(value: Any?) = when (value) {
        is String -> OTHER_TEXT
        is Map<*, *> -> OTHER_DICT
        is List<*> -> OTHER_LIST
        is Number, is Boolean -> OTHER_NUMBER
        is RangeValue -> OTHER_RANGE
        is Once -> OTHER_GENERATOR
        is View -> OTHER_VIEW
        is Callable -> OTHER_MACRO
        else -> emptySet()
    }

    private fun text(text: String, name: String, given: Arguments): Any? = when (name) {
        "strip" -> stripped(text, chars(name, given))
        "lstrip" -> stripped(text, chars(name, given), right = false)
        "rstrip" -> stripped(text, chars(name, given), left = false)
        "upper" -> plain(name, given) { upper(text) }
        "lower" -> plain(name, given) { lower(text) }
        "title" -> plain(name, given) { titled(text) }
        "capitalize" -> plain(name, given) { capitalized(text) }
        "isspace" -> plain(name, given) { text.isNotEmpty() && text.all { isSpace(it) } }
        "isupper", "islower" -> plain(name, given) { isCased(text, name == "isupper") }
        "split", "rsplit" -> splitted(text, name, given)
        "splitlines" -> lines(text, truth(given.bind(name, 0, "keepends")[0].or(false))).also { work.items(it.size.toLong()) }
        "startswith" -> ends(given, name) { text.startsWith(it) }
        "endswith" -> ends(given, name) { text.endsWith(it) }
        "removeprefix" -> text.removePrefix(string(given.bind(name, 1, "prefix")[0], name))
        "removesuffix" -> text.removeSuffix(string(given.bind(name, 1, "suffix")[0], name))
        "replace" -> {
            val (old, new, count) = positional(given).bind(name, 2, "old", "new", "count")
            work.replace(text, string(old, name), string(new, name), whole(count.or(-1L)) ?: broken("replace needs a whole number"))
        }
        "join" -> work.join(work.listed(positional(given).bind(name, 1, "items")[0]).map { string(it, name) }, text)
        "count" -> {
            val part = string(positional(given).bind(name, 1, "part")[0], name)
            if (part.isEmpty()) length(text) + 1 else split(text, part, -1).size - 1L
        }
        else -> position(text, name, given)
    }

    private fun <T> plain(name: String, given: Arguments, result: () -> T): T {
        given.bind(name, 0)
        return result().also { if (it is String) work.text(it.length.toLong()) }
    }

    private fun positional(given: Arguments) = if (given.named.isEmpty()) given else broken("a method's argument has no name")

    private fun string(value: Any?, name: String) = value as? String ?: broken("$name needs text, not ${typeOf(value)}")

    private fun chars(name: String, given: Arguments) = positional(given).bind(name, 0, "chars")[0].or(null)?.let { string(it, name) }

    private fun ends(given: Arguments, name: String, fits: (String) -> Boolean): Boolean {
        val part = positional(given).bind(name, 1, "part")[0]
        return if (part is TupleValue) part.items.any { fits(string(it, name)) } else fits(string(part, name))
    }

    private fun splitted(text: String, name: String, given: Arguments): List<String> {
        val (told, most) = given.bind(name, 0, "sep", "maxsplit")
        val separator = told.or(null)?.let { string(it, name) }
        val count = whole(most.or(-1L)) ?: broken("$name needs a whole number")
        if (name == "rsplit" && separator == null && count >= 0) unknown("rsplit at space, some times")
        val found = if (name == "split" || separator == null) split(text, separator, count) else splitFromEnd(text, separator, count)
        return found.also { work.items(it.size.toLong()) }
    }

    private fun position(text: String, name: String, given: Arguments): Long {
        val (part, from) = positional(given).bind(name, 1, "part", "start")
        val begin = whole(from.or(0L)) ?: broken("$name needs a whole number")
        if (begin < 0 || (begin > 0 && name == "rfind")) unknown("$name from ${begin}")
        val start = if (begin > length(text)) return missing(name) else text.offsetByCodePoints(0, begin.toInt())
        val found = string(part, name).let { if (name == "rfind") text.lastIndexOf(it) else text.indexOf(it, start) }
        return if (found < 0) missing(name) else text.codePointCount(0, found).toLong()
    }

    private fun missing(name: String) = if (name == "index") broken("index does not find the text") else -1L

    private fun dict(dict: Map<*, *>, name: String, given: Arguments): Any? = when (name) {
        "get" -> {
            val (wanted, default) = positional(given).bind(name, 1, "key", "default")
            if (dict.containsKey(key(wanted))) dict[wanted] else default.or(null)
        }
        else -> {
            given.bind(name, 0)
            when (name) {
                "items" -> View(name, dict.entries.map { TupleValue(listOf(it.key, it.value)) })
                "keys" -> View(name, dict.keys.toList())
                "values" -> View(name, dict.values.toList())
                else -> dict // a copy: nothing changes dicts
            }
        }
    }

    private fun list(items: List<Any?>, name: String, given: Arguments): Long {
        val wanted = positional(given).bind(name, 1, "item")[0]
        if (name == "count") return items.count { work.equal(it, wanted) }.toLong()
        return items.indexOfFirst { work.equal(it, wanted) }.takeIf { it >= 0 }?.toLong() ?: broken("index does not find the item")
    }

    private companion object {
        val TEXT = setOf(
            "strip", "lstrip", "rstrip", "upper", "lower", "title", "capitalize", "isspace", "isupper", "islower", "split", "rsplit",
            "splitlines", "startswith", "endswith", "removeprefix", "removesuffix", "replace", "join", "count", "find", "rfind", "index",
        )
        val OTHER_TEXT = setOf(
            "casefold", "center", "encode", "expandtabs", "format", "format_map", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
            "isidentifier", "isnumeric", "isprintable", "istitle", "ljust", "maketrans", "partition", "rindex", "rjust", "rpartition",
            "swapcase", "translate", "zfill",
        )
        val DICT = setOf("get", "items", "keys", "values", "copy")
        val OTHER_DICT = setOf("clear", "fromkeys", "pop", "popitem", "setdefault", "update")
        val LIST = setOf("count", "index")
        val OTHER_LIST = setOf("append", "clear", "copy", "extend", "insert", "pop", "remove", "reverse", "sort")
        val OTHER_NUMBER = setOf(
            "as_integer_ratio", "bit_count", "bit_length", "conjugate", "denominator", "from_bytes", "fromhex", "hex", "imag", "is_integer",
            "numerator", "real", "to_bytes",
        )
        val OTHER_RANGE = setOf("count", "index", "start", "stop", "step")
        val OTHER_GENERATOR = setOf("close", "send", "throw", "gi_code", "gi_frame", "gi_running", "gi_suspended", "gi_yieldfrom")
        val OTHER_VIEW = setOf("isdisjoint", "mapping")
        val OTHER_MACRO = setOf("arguments", "name", "caller", "catch_kwargs", "catch_varargs", "explicit_caller", "fromkeys")
    }
}

/** Python's `str.isupper` or `islower`. */
internal fun isCased(text: String, upper: Boolean): Boolean {
    val cased = text.codePoints().toArray().filter { Character.isUpperCase(it) || Character.isLowerCase(it) || Character.isTitleCase(it) }
    return cased.isNotEmpty() && cased.all { if (upper) Character.isUpperCase(it) else Character.isLowerCase(it) }
}

internal fun Work.replace(text: String, old: String, new: String, most: Long): String {
    val times = if (old.isEmpty()) text.length + 1L else split(text, old, most).size - 1L
    items(times)
    text(text.length + times * new.length)
    return replaced(text, old, new, most)
}

internal fun Work.join(parts: List<String>, separator: String): String {
    text(parts.sumOf { it.length.toLong() } + parts.size.toLong() * separator.length)
    return parts.joinToString(separator)
}
