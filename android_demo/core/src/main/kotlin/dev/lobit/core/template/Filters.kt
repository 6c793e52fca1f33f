package dev.lobit.core.template

/** Jinja's filters, which stand after a bar. */
internal class Filters(private val work: Work, private val access: Access, private val tests: Tests) {
    private val numbers = NumberFilters(work)
    private val sorting = Sorting(work, access)

    fun apply(name: String, value: Any?, given: Arguments): Any? = when (name) {
        "trim" -> trim(value, given)
        "upper" -> upper(text(value, name, given))
        "lower" -> lower(text(value, name, given))
        "title" -> wordsTitled(text(value, name, given))
        "capitalize" -> capitalized(text(value, name, given))
        "string" -> if (value is SafeText) value else text(value, name, given)
        "safe" -> SafeText(text(value, name, given))
        "tojson" -> JsonText.filter(work, value, given)
        "default", "d" -> default(name, value, given)
        "replace" -> replace(value, given)
        "indent" -> indent(value, given)
        "length", "count" -> length(name, value, given)
        "list" -> plain(name, given) { work.listed(value) }
        "items" -> plain(name, given) { Once(pairs(value)) }
        "first" -> plain(name, given) { work.iterated(value).let { if (it.hasNext()) it.next() else Undefined("the first of nothing") } }
        "last" -> plain(name, given) { reversible(value).let { if (it.isEmpty()) Undefined("the last of nothing") else it.last() } }
        "reverse" -> plain(name, given) { reversed(value) }
        "join" -> join(value, given)
        "map" -> mapped(value, given)
        "select", "reject" -> Once(selected(value, given, name == "select", attribute = false))
        "selectattr", "rejectattr" -> Once(selected(value, given, name == "selectattr", attribute = true))
        "sort", "unique", "dictsort", "min", "max" -> sorting.apply(name, value, given)
        else -> numbers.apply(name, value, given)
    }

    private fun text(value: Any?) = work.printed(value).also { work.text(it.length.toLong()) }

    private fun text(value: Any?, name: String, given: Arguments): String = plain(name, given) { text(value) }

    private fun <T> plain(name: String, given: Arguments, result: () -> T): T {
        given.bind(name, 0)
        return result()
    }

    private fun trim(value: Any?, given: Arguments): String {
        val chars = given.bind("trim", 0, "chars")[0].or(null)
        return stripped(text(value), if (chars == null) null else chars as? String ?: broken("trim needs text"))
    }

    private fun default(name: String, value: Any?, given: Arguments): Any? {
        val (default, boolean) = given.bind(name, 0, "default_value", "boolean")
        return if (value is Undefined || (truth(boolean.or(false)) && !truth(value))) default.or("") else value
    }

    private fun replace(value: Any?, given: Arguments): String {
        val (old, new, count) = given.bind("replace", 2, "old", "new", "count")
        val most = if (count.or(null) == null) -1 else whole(count) ?: broken("replace needs a whole number")
        return work.replace(text(value), work.printed(old), work.printed(new), most)
    }

    private fun indent(value: Any?, given: Arguments): String {
        val (width, first, blank) = given.bind("indent", 0, "width", "first", "blank")
        val told = width.or(4L)
        val space = told as? String ?: " ".repeat((whole(told) ?: broken("indent needs a whole number")).coerceIn(0, WIDEST + 1).toInt())
        if (space.length > WIDEST) unknown("an indent wider than $WIDEST")
        val all = lines((value as? String ?: broken("${typeOf(value)} is indented")) + "\n", keepEnds = false)
        work.items(all.size.toLong())
        work.text(value.length + all.size * (space.length + 1L))
        val blanks = truth(blank.or(false))
        val rest = all.drop(1).map { if (blanks || it.isNotEmpty()) space + it else it }
        val indented = (all.take(1) + rest).joinToString("\n")
        return if (truth(first.or(false))) space + indented else indented
    }

    private fun length(name: String, value: Any?, given: Arguments): Long = plain(name, given) {
        when (value) {
            is String -> length(value)
            is SafeText -> length(value.text)
            is Loop -> value.length
            else -> work.sized(value)?.size?.toLong() ?: broken("${typeOf(value)} has no length")
        }
    }

    private fun pairs(value: Any?): Iterator<Any?> = when (value) {
        is Map<*, *> -> value.entries.asSequence().map { TupleValue(listOf(it.key, it.value)) }.iterator()
        is Undefined -> emptyList<Any?>().iterator()
        else -> broken("${typeOf(value)} has no pairs")
    }

    private fun reversible(value: Any?) = work.sized(value) ?: broken("${typeOf(value)} has no last item that is known")

    private fun reversed(value: Any?): Any {
        val items = work.listed(value).reversed()
        return if (value is String) items.joinToString("") else Once(items.iterator())
    }

    private fun join(value: Any?, given: Arguments): String {
        val (separator, attribute) = given.bind("join", 0, "d", "attribute")
        val path = attribute.or(null)
        val parts = work.listed(value).map { text(if (path == null) it else access.path(it, path)) }
        return work.join(parts, work.printed(separator.or("")))
    }

    private fun mapped(value: Any?, given: Arguments): Once {
        if (!truth(value)) return Once(emptyList<Any?>().iterator())
        val change: (Any?) -> Any? = if (given.positional.isEmpty()) {
            val (path, default) = given.bind("map", 1, "attribute", "default")
            fun(item: Any?) = access.parts(path).fold(item) { found, part ->
                access.item(found, part).let { if (it is Undefined && default.or(null) != null) default else it }
            }
        } else {
            val filter = given.positional[0] as? String ?: broken("map needs the name of a filter")
            fun(item: Any?) = apply(filter, item, given.drop(1))
        }
        return Once(work.iterated(value).asSequence().map { work.step(); change(it) }.iterator())
    }

    private fun selected(value: Any?, given: Arguments, keep: Boolean, attribute: Boolean): Iterator<Any?> {
        if (!truth(value)) return emptyList<Any?>().iterator()
        if (attribute && given.positional.isEmpty()) broken("the name of an attribute is missing")
        val rest = if (attribute) given.drop(1) else given
        val test: (Any?) -> Boolean = when (val name = rest.positional.getOrElse(0) { ABSENT }) {
            ABSENT -> ::truth
            is String -> { item -> tests.holds(name, item, rest.drop(1)) }
            else -> broken("${typeOf(name)} is no test")
        }
        return work.iterated(value).asSequence().filter { item ->
            work.step()
            val tested = if (attribute) access.path(item, given.positional[0]) else item
            test(tested) == keep
        }.iterator()
    }

    private companion object {
        const val WIDEST = 100L
    }
}

/** Jinja's filter `title`: what follows space, a hyphen or an opening bracket begins with a capital. */
private fun wordsTitled(text: String): String {
    var begins = true
    return points(text).joinToString("") { letter ->
        val ends = letter.length == 1 && (isSpace(letter[0]) || letter[0] in "-({[<")
        val shown = if (ends || !begins) lower(letter) else upper(letter)
        begins = ends
        shown
    }
}
