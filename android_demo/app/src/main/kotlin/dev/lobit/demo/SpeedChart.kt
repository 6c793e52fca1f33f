package dev.lobit.demo

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.util.TypedValue
import android.view.View

/** A bar of a [SpeedChart]. */
data class Bar(val name: String, val rate: Double, val isPrefill: Boolean)

/** Draws tokens a second as horizontal bars; prefill and decode have scales of their own, since they are far apart. */
class SpeedChart(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val line = TypedValue.applyDimension(TypedValue.COMPLEX_UNIT_SP, LINE, resources.displayMetrics)
    private val text = Paint(Paint.ANTI_ALIAS_FLAG).apply {
        textSize = line * TEXT_SHARE
        color = context.getColor(R.color.muted)
    }
    private val fill = Paint()

    var bars: List<Bar> = emptyList()
        set(value) {
            field = value
            visibility = if (value.isEmpty()) GONE else VISIBLE
            contentDescription = context.getString(R.string.bench_chart, value.joinToString { "${it.name}: ${rounded(it.rate, 1)}" })
            requestLayout()
            invalidate()
        }

    override fun onMeasure(width: Int, height: Int) {
        setMeasuredDimension(MeasureSpec.getSize(width), (line * (bars.size + 1)).toInt())
    }

    override fun onDraw(canvas: Canvas) {
        val left = (bars.maxOfOrNull { text.measureText(it.name) } ?: 0f) + line / 2
        val room = width - left - text.measureText(rounded(bars.maxOfOrNull { it.rate } ?: 0.0, 1)) - line
        bars.forEachIndexed { index, bar ->
            val most = bars.filter { it.isPrefill == bar.isPrefill }.maxOf { it.rate }
            val top = line * (index + 0.5f)
            val right = left + room * (bar.rate / most).toFloat()
            fill.color = context.getColor(if (bar.isPrefill) R.color.bar_prefill else R.color.bar_decode)
            canvas.drawText(bar.name, 0f, top + line * TEXT_SHARE, text)
            canvas.drawRect(left, top, right, top + line * BAR_SHARE, fill)
            canvas.drawText(rounded(bar.rate, 1), right + line / 4, top + line * TEXT_SHARE, text)
        }
    }

    private companion object {
        const val LINE = 20f
        const val TEXT_SHARE = 0.65f
        const val BAR_SHARE = 0.8f
    }
}
