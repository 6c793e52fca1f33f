package dev.lobit.core.template

/** A part of a template that does something. */
internal sealed interface Statement

internal class Text(val text: String) : Statement

internal class Print(val line: Int, val value: Expression) : Statement

/** Cases in order; the last one's test is null where there is an `else`. */
internal class If(val line: Int, val cases: List<Pair<Expression?, List<Statement>>>) : Statement

internal class For(
    val line: Int, val target: Target, val items: Expression, val test: Expression?, val body: List<Statement>,
    val otherwise: List<Statement>,
) : Statement

internal class Assign(val line: Int, val target: Target, val value: Expression) : Statement

/** `{% set x %}` … `{% endset %}`; [filter] is applied to the text of [body], which it names as [Captured]. */
internal class AssignBlock(val line: Int, val target: Target, val filter: Expression, val body: List<Statement>) : Statement

/** `{% filter f %}` … `{% endfilter %}`. */
internal class FilterBlock(val line: Int, val filter: Expression, val body: List<Statement>) : Statement

internal class With(val line: Int, val targets: List<Target>, val values: List<Expression>, val body: List<Statement>) : Statement

internal class DefineMacro(val name: String, val parameters: List<Pair<String, Expression?>>, val body: List<Statement>) : Statement

internal class Leave(val continues: Boolean) : Statement

/** What can stand before an equals sign. */
internal sealed interface Target

internal class NameTarget(val name: String) : Target

internal class FieldTarget(val name: String, val field: String) : Target

internal class TupleTarget(val targets: List<Target>) : Target

/** A part of a template that has a value. */
internal sealed interface Expression

internal class Constant(val value: Any?) : Expression

/** The text of the block that a filter belongs to. */
internal object Captured : Expression

internal class Name(val name: String) : Expression

internal class Items(val items: List<Expression>, val tuple: Boolean) : Expression

internal class Dictionary(val pairs: List<Pair<Expression, Expression>>) : Expression

internal class Attribute(val line: Int, val of: Expression, val name: String) : Expression

internal class Item(val line: Int, val of: Expression, val key: Expression) : Expression

internal class Slice(val line: Int, val of: Expression, val start: Expression?, val stop: Expression?, val step: Expression?) : Expression

internal class Given(val positional: List<Expression>, val named: List<Pair<String, Expression>>)

internal class Call(val line: Int, val callee: Expression, val given: Given) : Expression

internal class Filter(val line: Int, val of: Expression, val name: String, val given: Given) : Expression

internal class Test(val line: Int, val of: Expression, val name: String, val given: Given) : Expression

internal class Not(val of: Expression) : Expression

internal class Both(val left: Expression, val right: Expression) : Expression

internal class Either(val left: Expression, val right: Expression) : Expression

internal class Sign(val of: Expression, val negative: Boolean) : Expression

internal class Binary(val operator: String, val left: Expression, val right: Expression) : Expression

internal class Concatenation(val parts: List<Expression>) : Expression

/** A chain such as `a < b <= c`. */
internal class Comparison(val first: Expression, val rest: List<Pair<String, Expression>>) : Expression

internal class Conditional(val test: Expression, val then: Expression, val otherwise: Expression?) : Expression
