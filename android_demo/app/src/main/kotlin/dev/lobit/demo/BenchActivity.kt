package dev.lobit.demo

import android.content.Context
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.TableLayout
import android.widget.TableRow
import android.widget.TextView
import dev.lobit.core.Bench
import dev.lobit.core.BenchRequest
import dev.lobit.core.LobitException
import org.json.JSONObject

/** Measures a bundle as `lobit bench` does, and shows the same table, drawn too. */
class BenchActivity : Screen() {
    private val name: String get() = intent.getStringExtra(NAME).orEmpty()

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.bench)
        title = getString(R.string.bench) + ": " + name
        actionBar?.setDisplayHomeAsUpEnabled(true)
        findViewById<Button>(R.id.start).setOnClickListener { if (ours(store.state)?.running == true) store.cancelBench() else start() }
        findViewById<Button>(R.id.share).setOnClickListener { share() }
    }

    private fun ours(state: State) = state.bench?.takeIf { it.name == name }

    private fun start() {
        try {
            val (prompts, generates, depths) = listOf(R.id.prompts, R.id.generates, R.id.depths).map { numbers(typed(it)) }
            val repetitions = number(typed(R.id.repetitions))
            store.bench(name, BenchRequest(prompts, generates, depths, repetitions))
        } catch (error: LobitException) {
            findViewById<TextView>(R.id.problem).setTextOrHide(error.message)
        }
    }

    private fun typed(field: Int) = findViewById<EditText>(field).text.toString()

    private fun numbers(text: String): List<Int> = text.split(",").map { it.trim() }.filter { it.isNotEmpty() }.map(::number)

    private fun number(text: String): Int = text.toIntOrNull() ?: throw LobitException(getString(R.string.bench_numbers))

    override fun show(state: State) {
        showWork(state)
        val bench = ours(state)
        findViewById<Button>(R.id.start).setText(if (bench?.running == true) R.string.stop else R.string.start)
        findViewById<View>(R.id.share).isEnabled = bench?.result != null
        showResult(bench?.result)
    }

    private fun showResult(result: JSONObject?) {
        val rows = result?.getJSONArray("rows")?.let { array -> List(array.length(), array::getJSONObject) }.orEmpty()
        val table = findViewById<TableLayout>(R.id.table)
        table.removeAllViews()
        if (rows.isNotEmpty()) table.addView(line(getString(R.string.bench_columns).split("\t"), header = true))
        rows.forEach { table.addView(line(cells(it), header = false)) }
        findViewById<SpeedChart>(R.id.chart).bars = rows.map { Bar(nameOf(it), Bench.speeds(it).average(), it.getString("phase") == "pp") }
    }

    private fun nameOf(row: JSONObject) = dev.lobit.core.Workload(row.getString("phase"), row.getInt("tokens"), row.getInt("depth")).name

    private fun cells(row: JSONObject): List<String> {
        val (mean, deviation) = Bench.spread(Bench.speeds(row))
        val firsts = row.optJSONArray("first_token_ns")
        val first = firsts?.let { array -> List(array.length(), array::getLong).average() / 1e6 }
        val (before, after) = listOf("before", "after").map { row.getJSONObject(it).optDouble("battery_celsius") }
        val battery = if (before.isNaN() || after.isNaN()) "" else "${rounded(before, 1)} → ${rounded(after, 1)} °C"
        return listOf(
            nameOf(row), "${rounded(mean, 1)} ± ${rounded(deviation, 1)}", first?.let { rounded(it, 1) + " ms" }.orEmpty(),
            size(row.getLong("peak_rss_bytes")), battery,
        )
    }

    private fun line(cells: List<String>, header: Boolean) = TableRow(this).apply {
        val padding = (CELL_PADDING * resources.displayMetrics.density).toInt()
        for (cell in cells) {
            val view = TextView(context, null, 0, if (header) R.style.Small else R.style.Text)
            view.text = cell
            view.setPadding(0, padding / 2, 2 * padding, padding / 2)
            addView(view)
        }
    }

    /** Hands the result as JSON to whatever app the user chooses. */
    private fun share() {
        val result = ours(store.state)?.result ?: return
        val text = JSONObject(result.toString()).put("kind", "phone_bench").put("bundle", name).toString(2)
        val send = Intent(Intent.ACTION_SEND).setType("application/json")
            .putExtra(Intent.EXTRA_TEXT, text).putExtra(Intent.EXTRA_SUBJECT, "$name.json")
        startActivity(Intent.createChooser(send, getString(R.string.share)))
    }

    companion object {
        private const val NAME = "name"
        private const val CELL_PADDING = 8

        fun intent(context: Context, name: String): Intent = Intent(context, BenchActivity::class.java).putExtra(NAME, name)
    }
}
