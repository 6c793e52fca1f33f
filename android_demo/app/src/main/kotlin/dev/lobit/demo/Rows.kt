package dev.lobit.demo

import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.BaseAdapter

/** The rows of a list: each of [items] is shown by [bind] in a view of [layout]. */
class Rows<T>(private val inflater: LayoutInflater, private val layout: Int, private val bind: (View, T) -> Unit) : BaseAdapter() {
    var items: List<T> = emptyList()
        set(value) {
            field = value
            notifyDataSetChanged()
        }

    override fun getCount() = items.size

    override fun getItem(index: Int): Any? = items[index]

    override fun getItemId(index: Int) = index.toLong()

    override fun getView(index: Int, old: View?, parent: ViewGroup): View =
        (old ?: inflater.inflate(layout, parent, false)).also { bind(it, items[index]) }
}
